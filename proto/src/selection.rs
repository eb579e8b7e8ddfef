//! Which metadata contexts a client has chosen, and of which export.

use std::collections::HashSet;

use crate::export::Catalog;
use crate::extents::ContextId;
use crate::option::{Declined, invalid};

/// The contexts that a client has chosen.
///
/// It keeps names, not handles: between the choice and the entry an export of the same name may
/// have become another one, and the client is owed what it enters.
pub(crate) struct Selection {
    export: String,
    names: Vec<(ContextId, String)>,
}

impl Selection {
    /// Chooses the contexts that `queries` name exactly; one asked for twice is chosen once.
    pub(crate) fn choose<C: Catalog>(
        catalog: &C,
        export: (&str, &C::Export),
        queries: Vec<String>,
    ) -> Self {
        let (export_name, export) = export;
        let mut seen = HashSet::new();
        let names = queries
            .into_iter()
            .filter(|query| seen.insert(query.clone()))
            .filter(|query| catalog.find_context(export, query).is_some())
            .zip(1..)
            .map(|(name, id)| (ContextId(id), name))
            .collect();
        Self {
            export: export_name.to_owned(),
            names,
        }
    }

    pub(crate) fn names(&self) -> &[(ContextId, String)] {
        &self.names
    }

    /// How many were chosen for an export entered as `name`.
    pub(crate) fn count_for(&self, name: &str) -> usize {
        if self.export == name {
            self.names.len()
        } else {
            0
        }
    }

    /// The handles that the chosen names stand for in `export`, entered as `name`.
    ///
    /// None, if the choice was made for another name. An error if a context has gone: its id has
    /// been told, so it cannot just be left out.
    pub(crate) fn resolve<C: Catalog>(
        &self,
        catalog: &C,
        name: &str,
        export: &C::Export,
    ) -> Result<Vec<(ContextId, C::Context)>, Declined> {
        if self.export != name {
            return Ok(Vec::new());
        }
        self.names
            .iter()
            .map(|(id, name)| match catalog.find_context(export, name) {
                Some(context) => Ok((*id, context)),
                None => Err(invalid(format!(
                    "metadata context {name:?} no longer exists"
                ))),
            })
            .collect()
    }
}

/// The names of the contexts that match any of `queries`, or of all listed ones if there is none.
///
/// A query is a full name, listed or not, or the beginning of one up to a colon.
pub(crate) fn matching<C: Catalog>(
    catalog: &C,
    export: &C::Export,
    queries: &[String],
) -> Vec<String> {
    let listed = catalog.listed_contexts(export);
    if queries.is_empty() {
        return listed;
    }

    let mut seen = HashSet::new();
    let mut names = Vec::new();
    for query in queries {
        let exact = catalog.find_context(export, query).map(|_| query);
        let wildcard = query.ends_with(':');
        let below = listed
            .iter()
            .filter(|name| wildcard && name.starts_with(query.as_str()));
        for name in exact.into_iter().chain(below) {
            if seen.insert(name.clone()) {
                names.push(name.clone());
            }
        }
    }
    names
}
