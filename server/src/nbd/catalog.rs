use std::rc::Rc;
use std::sync::Arc;

use proto::{BlockSize, Catalog, Denied, ExportInfo, Listed, TransmissionFlags};

use super::entrance::Visitor;
use crate::export::{self, Context, Export};
use crate::service::Service;

/// The exports that one client is offered.
pub(super) struct Exports {
    service: Arc<Service>,
    visitor: Rc<Visitor>,
}

impl Exports {
    pub(super) fn new(service: Arc<Service>, visitor: Rc<Visitor>) -> Self {
        Self { service, visitor }
    }

    fn find(&self, name: &str) -> Result<Export, Denied> {
        let role = self.visitor.entrance.role;
        let found = export::find(&self.service, role, name).ok_or(Denied::Unknown)?;
        self.visitor.take_place()?;
        Ok(found)
    }
}

impl Catalog for Exports {
    type Export = Export;
    type Context = Context;

    fn list(&self) -> Vec<Listed> {
        let all = export::list(&self.service, self.visitor.entrance.role);
        all.into_iter()
            .map(|(name, description)| Listed {
                name,
                description: Some(description),
            })
            .collect()
    }

    fn open(&self, name: &str) -> Result<(Export, ExportInfo), Denied> {
        let found = self.find(name);
        let found = found.inspect_err(|denied| self.visitor.is_refused(denied))?;
        let info = ExportInfo {
            name: found.name_for(name).to_owned(),
            description: Some(found.description()),
            size: found.size(),
            flags: flags(&found),
            block_size: BlockSize::default(),
        };
        Ok((found, info))
    }

    fn listed_contexts(&self, export: &Export) -> Vec<String> {
        export.contexts(&self.service)
    }

    fn find_context(&self, export: &Export, name: &str) -> Option<Context> {
        export.context(&self.service, name)
    }
}

/// A flush covers what any connection was told is written, as all of them share one descriptor; so
/// clients may use several.
fn flags(export: &Export) -> TransmissionFlags {
    let all = TransmissionFlags::HAS_FLAGS
        | TransmissionFlags::SEND_FLUSH
        | TransmissionFlags::SEND_FUA
        | TransmissionFlags::SEND_DF
        | TransmissionFlags::SEND_CACHE
        | TransmissionFlags::BLOCK_STATUS_PAYLOAD
        | TransmissionFlags::CAN_MULTI_CONN;
    if export.read_only() {
        all | TransmissionFlags::READ_ONLY
    } else {
        all | TransmissionFlags::SEND_TRIM
            | TransmissionFlags::SEND_WRITE_ZEROES
            | TransmissionFlags::SEND_FAST_ZERO
    }
}
