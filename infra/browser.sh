#!/usr/bin/env bash
# The browser of the tests that look at pages: finds Chromium and its driver, or installs Debian's.
set -euo pipefail

there() { command -v chromium >/dev/null && command -v chromedriver >/dev/null; }

there && exit 0
run=()
if [ "$(id -u)" -ne 0 ]; then
    command -v sudo >/dev/null && sudo -n true 2>/dev/null && run=(sudo -n)
fi
if command -v apt-get >/dev/null && { [ "$(id -u)" -eq 0 ] || [ "${#run[@]}" -gt 0 ]; }; then
    echo "installing chromium and chromium-driver for the tests of pages" >&2
    "${run[@]}" apt-get -qq update >&2
    DEBIAN_FRONTEND=noninteractive "${run[@]}" apt-get -qq install --yes --no-install-recommends chromium chromium-driver >&2
fi
there && exit 0
echo "The tests of pages need \`chromium\` and \`chromedriver\` on the PATH; on Debian: apt-get install chromium chromium-driver" >&2
exit 1
