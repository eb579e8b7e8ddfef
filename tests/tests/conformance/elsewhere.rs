//! Rules whose tests stand in other files, as they need more than a socket: the extension of
//! extended headers, and TLS.

use std::fs;
use std::path::PathBuf;

use stillpoint_tests::tools::repository;

/// One rule of the protocol, and where the test is that a server keeps it.
pub(crate) struct Pointer {
    /// Where the rule stands in the protocol's document.
    pub(crate) section: &'static str,
    /// The rule in our words.
    pub(crate) rule: &'static str,
    /// The test: its binary, its modules and its name.
    pub(crate) test: &'static str,
}

/// The rules of all sections, which have their numbers from the order.
pub(crate) const ELSEWHERE: [(&str, &[Pointer]); 2] = [("extended", EXTENDED), ("tls", TLS)];

const fn row(section: &'static str, rule: &'static str, test: &'static str) -> Pointer {
    Pointer {
        section,
        rule,
        test,
    }
}

const EXTENDED: &[Pointer] = &[
    row(
        "NBD_OPT_EXTENDED_HEADERS",
        "EXTENDED_HEADERS is acknowledged, whether or not structured replies came first",
        "extended::negotiation::extended_headers_are_agreed_on_with_and_without_structured_replies",
    ),
    row(
        "NBD_OPT_EXTENDED_HEADERS",
        "EXTENDED_HEADERS with data is ERR_INVALID, and is then not negotiated",
        "extended::negotiation::extended_headers_take_no_data",
    ),
    row(
        "NBD_OPT_EXTENDED_HEADERS",
        "EXTENDED_HEADERS a second time is acknowledged, and stays negotiated",
        "extended::negotiation::extended_headers_asked_for_twice_are_agreed_on_twice",
    ),
    row(
        "NBD_OPT_STRUCTURED_REPLY; NBD_REP_ERR_EXT_HEADER_REQD",
        "STRUCTURED_REPLY afterwards is ERR_EXT_HEADER_REQD, and changes nothing",
        "extended::negotiation::structured_replies_are_refused_afterwards",
    ),
    row(
        "NBD_OPT_EXPORT_NAME; NBD_OPT_EXTENDED_HEADERS",
        "EXPORT_NAME afterwards ends the session",
        "extended::negotiation::the_old_way_in_ends_the_connection",
    ),
    row(
        "NBD_OPT_INFO and NBD_OPT_GO",
        "GO is there for whoever has extended headers, and DF is offered",
        "extended::negotiation::contexts_and_df_need_nothing_else",
    ),
    row(
        "NBD_OPT_LIST_META_CONTEXT; NBD_OPT_SET_META_CONTEXT",
        "Contexts can be listed and selected with extended headers alone",
        "extended::negotiation::contexts_and_df_need_nothing_else",
    ),
    row(
        "NBD_OPT_EXTENDED_HEADERS; NBD_OPT_STARTTLS",
        "Extended headers from before STARTTLS are forgotten",
        "tls::handshake::what_was_agreed_before_tls_is_forgotten",
    ),
    row(
        "NBD_FLAG_BLOCK_STATUS_PAYLOAD",
        "BLOCK_STATUS_PAYLOAD is offered with extended headers and selected contexts alone",
        "extended::negotiation::filters_are_offered_to_whoever_chose_contexts_of_the_export",
    ),
    row(
        "Extended reply chunk message; Simple reply message; NBD_CMD_READ",
        "Every reply is in extended chunks with the cookie and the offset of the request, those \
         without a payload too",
        "extended::requests::\
         every_answer_is_in_extended_chunks_that_repeat_the_offset_of_the_request",
    ),
    row(
        "NBD_REPLY_TYPE_ERROR",
        "Errors come with a text",
        "extended::requests::an_error_has_a_text",
    ),
    row(
        "Request message",
        "A request in the form that was not negotiated ends the session",
        "extended::requests::a_request_in_the_form_that_was_not_agreed_on_ends_the_connection",
    ),
    row(
        "Request message; NBD_CMD_FLAG_PAYLOAD_LEN",
        "PAYLOAD_LEN in a compact request is EINVAL",
        "extended::requests::a_compact_request_must_not_have_the_flag_of_a_payload",
    ),
    row(
        "Request message; NBD_CMD_FLAG_PAYLOAD_LEN",
        "A payload of a command that has none is read past, and is EINVAL",
        "extended::requests::a_payload_where_it_has_no_meaning_is_skipped_and_invalid",
    ),
    row(
        "Request message",
        "The payload of a write that is refused is read past",
        "extended::requests::the_payload_of_a_refused_write_is_skipped",
    ),
    row(
        "Request message",
        "A payload of more than the largest ends the session, and one of the largest is written",
        "extended::requests::the_longest_payload_is_written_and_a_longer_one_ends_the_connection",
    ),
    row(
        "NBD_CMD_FLAG_PAYLOAD_LEN; NBD_CMD_WRITE",
        "A WRITE without PAYLOAD_LEN has a payload all the same: more than the protocol asks for",
        "extended::requests::\
         a_write_without_the_flag_has_a_payload_all_the_same_as_some_clients_forget_it",
    ),
    row(
        "NBD_CMD_READ; Size constraints",
        "A read of more than the largest payload is EOVERFLOW, and ends nothing",
        "extended::requests::a_read_longer_than_a_payload_overflows_and_past_the_end_it_is_invalid",
    ),
    row(
        "Error values; Command flags",
        "FUA is accepted on every command",
        "extended::requests::fua_is_accepted_on_every_command",
    ),
    row(
        "Size constraints; NBD_CMD_WRITE_ZEROES",
        "A zeroing may be longer than 32 bits, and reaches to its end and no further",
        "extended::length::zeroes_of_64_bits_reach_to_their_end_and_no_further",
    ),
    row(
        "Size constraints; NBD_CMD_TRIM",
        "So may a trim",
        "extended::length::a_trim_of_64_bits_reaches_to_its_end_and_no_further",
    ),
    row(
        "Size constraints; NBD_CMD_CACHE",
        "So may a caching",
        "extended::length::a_cache_request_may_be_of_the_whole_disk",
    ),
    row(
        "NBD_CMD_FLAG_FAST_ZERO",
        "FAST_ZERO of more than 32 bits is never EOVERFLOW",
        "extended::length::fast_zeroes_do_not_overflow",
    ),
    row(
        "Error values; Size constraints",
        "Past the end a zeroing is ENOSPC and the rest is EINVAL, however long",
        "extended::length::past_the_end_is_no_space_for_zeroes_and_invalid_for_the_rest",
    ),
    row(
        "NBD_REPLY_TYPE_BLOCK_STATUS_EXT; NBD_CMD_BLOCK_STATUS",
        "A block status is answered with BLOCK_STATUS_EXT, also where 32 bits would do; the count \
         fits the length, and the upper half of the flags is zero",
        "extended::block_status::extents_are_of_64_bits_even_where_32_would_do",
    ),
    row(
        "NBD_REPLY_TYPE_BLOCK_STATUS; NBD_REPLY_TYPE_BLOCK_STATUS_EXT",
        "Without extended headers it never is",
        "extended::block_status::a_compact_session_gets_extents_of_32_bits",
    ),
    row(
        "NBD_CMD_BLOCK_STATUS; NBD_CMD_FLAG_REQ_ONE",
        "An extent may be longer than 32 bits; with REQ_ONE there is one, no longer than the \
         request",
        "extended::block_status::\
         an_extent_may_be_longer_than_32_bits_and_one_never_longer_than_the_request",
    ),
    row(
        "NBD_CMD_BLOCK_STATUS",
        "Each selected context has one chunk; with a filter those that it names do, and no other",
        "extended::block_status::a_filter_asks_for_some_of_the_chosen_contexts",
    ),
    row(
        "NBD_CMD_BLOCK_STATUS",
        "The length of the range is that in the filter, not that of the payload",
        "extended::block_status::a_filter_has_the_length_of_the_range_in_its_payload",
    ),
    row(
        "NBD_CMD_BLOCK_STATUS",
        "A filter of ids that are unknown or repeated is read past, and is EINVAL",
        "extended::block_status::\
         a_filter_of_contexts_that_are_unknown_or_repeated_or_none_is_invalid",
    ),
    row(
        "NBD_CMD_BLOCK_STATUS",
        "A filter that is no length and ids, or is of nothing, is EINVAL, and ends nothing",
        "extended::block_status::a_filter_of_no_right_size_or_for_no_right_range_is_invalid",
    ),
    row(
        "NBD_CMD_BLOCK_STATUS; NBD_FLAG_BLOCK_STATUS_PAYLOAD",
        "A filter that was not offered is read past, and is EINVAL",
        "extended::block_status::a_filter_that_was_not_offered_is_invalid",
    ),
    row(
        "NBD_CMD_BLOCK_STATUS",
        "A reply has at most 2^20 extents, ours at most 2^16, and the client comes to the end",
        "extended::size::\
         the_map_of_a_fragmented_disk_takes_little_memory_and_is_the_same_in_either_form",
    ),
];

const TLS: &[Pointer] = &[
    row(
        "NOTLS mode",
        "Where there is no TLS, STARTTLS is ERR_POLICY, and exports can be entered",
        "tls::handshake::where_tls_is_off_it_is_declined_and_where_it_is_on_both_are_served",
    ),
    row(
        "Server-side requirements; Client-side requirements",
        "There is no TLS for a client without fixed newstyle",
        "tls::handshake::without_fixed_newstyle_there_is_no_tls",
    ),
    row(
        "FORCEDTLS mode",
        "Any option but STARTTLS and ABORT is TLS_REQD, unknown ones and nonsense too",
        "tls::handshake::where_tls_is_required_everything_else_is_told_so",
    ),
    row(
        "FORCEDTLS mode; NBD_OPT_EXPORT_NAME",
        "EXPORT_NAME before TLS ends the session",
        "tls::handshake::where_tls_is_required_everything_else_is_told_so",
    ),
    row(
        "SELECTIVETLS mode",
        "Where TLS is on, exports can be entered with it and without, and nothing is TLS_REQD",
        "tls::handshake::where_tls_is_off_it_is_declined_and_where_it_is_on_both_are_served",
    ),
    row(
        "NBD_OPT_STARTTLS",
        "STARTTLS is acknowledged, and with data it is ERR_INVALID",
        "tls::handshake::starttls_takes_no_data_and_comes_once",
    ),
    row(
        "FORCEDTLS mode; SELECTIVETLS mode",
        "A second STARTTLS is ERR_INVALID, and nothing is TLS_REQD any more",
        "tls::handshake::starttls_takes_no_data_and_comes_once",
    ),
    row(
        "NBD_OPT_STARTTLS",
        "What was negotiated before TLS is forgotten",
        "tls::handshake::what_was_agreed_before_tls_is_forgotten",
    ),
    row(
        "FORCEDTLS mode; Protocol downgrade attacks",
        "Plain text behind STARTTLS is not acted on",
        "tls::handshake::plain_text_that_was_sent_ahead_is_not_acted_on",
    ),
    row(
        "FORCEDTLS mode; Termination of the session during option haggling; Terminating the \
         transmission phase",
        "After the acknowledgement nothing is sent but TLS, which is shut down before the \
         connection is",
        "tls::handshake::\
         nothing_is_said_in_plain_text_after_the_acknowledgement_and_every_end_is_announced",
    ),
    row(
        "FORCEDTLS mode",
        "A TLS handshake that fails ends the session",
        "tls::peers::\
         only_certificates_of_the_authority_are_let_in_and_the_log_says_whose_or_why_not",
    ),
    row(
        "Server-side requirements",
        "New certificates are for new connections, and change nothing in those that are open",
        "tls::files::sighup_gives_new_connections_the_new_certificate_and_leaves_the_others",
    ),
    row(
        "TLS versions",
        "TLS 1.2 and 1.3 are there",
        "tls::handshake::large_answers_come_whole_in_both_versions",
    ),
    row(
        "TLS versions",
        "Older versions are not",
        "tls::handshake::versions_before_tls_1_2_are_refused",
    ),
    row(
        "Protocol downgrade attacks",
        "An address of a network is served only where TLS is required, unless one insists",
        "tls::tools::only_required_tls_opens_a_network",
    ),
];

#[test]
fn every_test_that_is_pointed_to_is_there() {
    for (section, pointers) in ELSEWHERE {
        for Pointer { rule, test, .. } in pointers {
            let (file, name) = place_of(test);
            let source = fs::read_to_string(&file)
                .unwrap_or_else(|error| panic!("{section}: {test}: {}: {error}", file.display()));
            let lines: Vec<_> = source.lines().map(str::trim).collect();
            let head = format!("fn {name}() {{");
            let is_there = lines.windows(2).any(|two| two == ["#[test]", &*head]);
            assert!(is_there, "{section}: {test}: no test");
            assert!(!rule.contains('|') && !rule.ends_with('.'));
        }
    }
}

/// The file of a test, and its name there.
fn place_of(test: &str) -> (PathBuf, &str) {
    let parts: Vec<_> = test.split("::").collect();
    let [binary, module, name] = parts[..] else {
        panic!("{test} is not in a module of a binary")
    };
    let tests = repository().join("tests/tests");
    (tests.join(binary).join(format!("{module}.rs")), name)
}
