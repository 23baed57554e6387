#!/bin/sh
# Sees to it that there is a Chromium for the test of the live page: installs it where it is missing
# and may. Where it may not, the test is skipped, which is said loudly; under CI=true that fails.
set -u

for name in chromium chromium-browser google-chrome; do
    command -v "$name" >/dev/null 2>&1 && exit 0
done

if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null 2>&1; then
    echo "installing Chromium for the test of the live page"
    export DEBIAN_FRONTEND=noninteractive
    apt-get update -qq >/dev/null  # what is known already may do where this fails
    apt-get install -y -qq --no-install-recommends chromium >/dev/null && exit 0
    why="apt-get could not install it"
else
    why="only root can install it, with apt-get"
fi

echo "****************************************************************************" >&2
echo "* NO CHROMIUM ($why)." >&2
echo "* The live page will NOT be tested in a browser." >&2
echo "* As root: apt-get install --no-install-recommends chromium" >&2
echo "****************************************************************************" >&2
[ "${CI:-}" != true ]
