# shellcheck shell=bash
# Sourced by the other scripts: `--help` prints the comment that each of them begins with, and ends it.

case ${1-} in
    -h | --help)
        sed -n '2,/^[^#]/s/^#[[:blank:]]\{0,1\}//p' "$0"
        exit
        ;;
esac
