#!/bin/sh
# Chromium and its driver, for the browser tests of pages, from Debian or Ubuntu. Does nothing where
# both are there; where it may not install, it says so and the browser tests are skipped.
set -eu
if command -v chromedriver >/dev/null && command -v chromium >/dev/null; then exit 0; fi
if ! command -v apt-get >/dev/null; then
    echo "browser tests need chromium and chromedriver on the PATH; they are skipped without" >&2
    exit 0
fi
run=""
if [ "$(id -u)" != 0 ]; then run="sudo -n"; fi
if ! { $run apt-get update -q && $run apt-get install -y -q chromium chromium-driver; } >/dev/null 2>&1; then
    echo "could not install chromium and chromium-driver; browser tests are skipped without them" >&2
fi
