//! What the tests share: a running server, and other people's tools.
