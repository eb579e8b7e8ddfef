//! Columns for people.

use std::fmt::Write;

/// Rows under their headings, each column as wide as its widest text.
pub(super) struct Table<const N: usize> {
    rows: Vec<[String; N]>,
}

impl<const N: usize> Table<N> {
    /// A table with these headings.
    pub(super) fn new(headings: [&str; N]) -> Self {
        Self {
            rows: vec![headings.map(str::to_owned)],
        }
    }

    /// Adds a row at the end.
    pub(super) fn push(&mut self, row: [String; N]) {
        self.rows.push(row);
    }

    /// The table as text.
    pub(super) fn render(&self) -> String {
        let widths: [usize; N] = std::array::from_fn(|column| {
            let lengths = self.rows.iter().map(|row| row[column].chars().count());
            lengths.max().unwrap_or(0)
        });
        let mut text = String::new();
        for row in &self.rows {
            let mut line = String::new();
            for (cell, width) in row.iter().zip(widths) {
                write!(line, "{cell:width$}  ").expect("a string takes everything");
            }
            text.push_str(line.trim_end());
            text.push('\n');
        }
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_stand_below_their_headings() {
        let mut table = Table::new(["A", "LONG"]);
        table.push(["wide".into(), "x".into()]);
        table.push(["é".into(), String::new()]);
        assert_eq!(table.render(), "A     LONG\nwide  x\né\n");
    }
}
