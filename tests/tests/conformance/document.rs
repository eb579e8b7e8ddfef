//! The rows, and what others do instead, as `docs/protocol.md` has them.

use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::{env, fs};

use stillpoint_tests::tools::repository;

use crate::SECTIONS;
use crate::deviations::{DEVIATIONS, When};
use crate::elsewhere::ELSEWHERE;

#[test]
fn the_tables_in_the_docs_are_the_rows_that_run() {
    let path = repository().join("docs/protocol.md");
    let text = fs::read_to_string(&path).expect("docs/protocol.md");
    let expected = with_table(&text, "rows", &rows());
    let expected = with_table(&expected, "elsewhere", &elsewhere());
    let expected = with_table(&expected, "differences", &differences());
    if env::var_os("STILLPOINT_WRITE_DOCS").is_some() {
        fs::write(&path, expected).expect("docs/protocol.md can be written");
    } else {
        let stale = expected
            .lines()
            .zip(text.lines())
            .find(|(new, old)| new != old);
        assert!(
            expected == text,
            "docs/protocol.md is not what the tests say, from {stale:?} on: run this test with \
             STILLPOINT_WRITE_DOCS=1"
        );
    }
}

#[test]
fn every_row_has_an_id_of_its_own_in_its_section() {
    let mut tests = BTreeSet::new();
    for (section, rows) in SECTIONS {
        for (index, row) in rows.iter().enumerate() {
            assert_eq!(row.id, format!("{section}-{}", index + 1));
            assert!(tests.insert(row.test), "{} stands in two rows", row.test);
            assert!(!row.rule.contains('|') && !row.rule.ends_with('.'));
        }
    }
    for each in DEVIATIONS {
        let mut rows = SECTIONS.iter().flat_map(|(_, rows)| *rows);
        assert!(rows.any(|row| row.id == each.id), "no row {}", each.id);
    }
}

fn rows() -> String {
    let mut table = String::new();
    for (section, rows) in SECTIONS {
        let _ = write!(table, "\n### {section}\n\n");
        table
            .push_str("| row | section of `proto.md` | rule | test |\n| --- | --- | --- | --- |\n");
        for row in rows {
            let (id, test) = (row.id, row.test);
            let _ = writeln!(
                table,
                "| {id} | {} | {} | `{test}` |",
                row.section, row.rule
            );
        }
    }
    table
}

fn elsewhere() -> String {
    let mut table = String::new();
    for (section, pointers) in ELSEWHERE {
        let _ = write!(table, "\n### {section}\n\n");
        table.push_str("| row | section | rule | test |\n| --- | --- | --- | --- |\n");
        for (index, pointer) in pointers.iter().enumerate() {
            let (number, test) = (index + 1, pointer.test);
            let _ = writeln!(
                table,
                "| {section}-{number} | {} | {} | `{test}` |",
                pointer.section, pointer.rule
            );
        }
    }
    table
}

fn differences() -> String {
    let mut table = "\n| row | server | what it does instead |\n| --- | --- | --- |\n".to_owned();
    for each in DEVIATIONS {
        let when = match each.when {
            When::Always => "",
            When::Sometimes => "sometimes: ",
        };
        let server = each.peer.program();
        let (id, instead) = (each.id, each.instead);
        let _ = writeln!(table, "| {id} | {server} | {when}{instead} |");
    }
    table
}

/// The document with another table between the lines that say where it begins and ends.
fn with_table(text: &str, name: &str, table: &str) -> String {
    let (begin, end) = (
        format!("<!-- {name}: begin -->\n"),
        format!("\n<!-- {name}: end -->"),
    );
    let (before, rest) = text.split_once(&begin).expect("a beginning");
    let (_, after) = rest.split_once(&end).expect("an end");
    format!("{before}{begin}{table}{end}{after}")
}
