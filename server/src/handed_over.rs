//! Sockets that a service manager listens on for us, as `sd_listen_fds(3)` describes them.

use std::env;
use std::net::TcpListener;
use std::os::fd::AsFd;
use std::os::unix::net::UnixListener;

use listenfd::ListenFd;
use rustix::net::sockopt;

use crate::address::Address;
use crate::export::Role;
use crate::failure::Failure;

/// A socket that listens already, and goes on when the server has stopped.
pub(crate) struct HandedOver {
    /// The socket.
    pub(crate) socket: Socket,
    /// Where it is.
    pub(crate) address: Address,
    /// What is to be served there.
    pub(crate) purpose: Purpose,
}

/// A listening socket of either kind, not yet tied to a runtime.
pub(crate) enum Socket {
    /// In the file system.
    Unix(UnixListener),
    /// On a network.
    Tcp(TcpListener),
}

/// What a socket is for.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Purpose {
    /// NBD.
    Data(Role),
    /// QMP.
    Control,
}

/// Takes all the sockets there are. To be called once, before there is any other thread: it takes
/// what tells of them out of the environment.
pub(crate) fn take() -> Result<Vec<HandedOver>, Failure> {
    let names = env::var("LISTEN_FDNAMES").unwrap_or_default();
    let mut fds = ListenFd::from_env();
    let count = fds.len();
    let mut names = names.split(':');
    let mut taken = Vec::new();
    for index in 0..count {
        let name = names.next().unwrap_or_default();
        let purpose = purpose(name, count)?;
        let (socket, address) = socket(&mut fds, index)
            .ok_or_else(|| wrong(name, "is no stream socket that listens at a path or a port"))?;
        taken.push(HandedOver {
            socket,
            address,
            purpose,
        });
    }
    Ok(taken)
}

fn purpose(name: &str, count: usize) -> Result<Purpose, Failure> {
    match name {
        "live" => Ok(Purpose::Data(Role::Live)),
        "backup" => Ok(Purpose::Data(Role::Backup)),
        "control" => Ok(Purpose::Control),
        _ if count == 1 => Ok(Purpose::Data(Role::Live)),
        _ => Err(wrong(name, "has a name that says nothing")),
    }
}

fn socket(fds: &mut ListenFd, index: usize) -> Option<(Socket, Address)> {
    if let Ok(Some(socket)) = fds.take_unix_listener(index) {
        let path = socket.local_addr().ok()?.as_pathname()?.to_owned();
        return listens(&socket).then(|| (Socket::Unix(socket), Address::Unix(path)));
    }
    let socket = fds.take_tcp_listener(index).ok()??;
    let place = socket.local_addr().ok()?;
    let address = Address::Tcp {
        host: place.ip().to_string(),
        port: place.port(),
    };
    listens(&socket).then(|| (Socket::Tcp(socket), address))
}

fn listens(socket: &impl AsFd) -> bool {
    sockopt::socket_acceptconn(socket).unwrap_or(false)
}

fn wrong(name: &str, what: &str) -> Failure {
    let message = format!("a socket that the service manager hands over, '{name}', {what}");
    let hint = "each has a name of its own: FileDescriptorName=live, backup or control";
    Failure::new("handed-over", message).hint(hint)
}
