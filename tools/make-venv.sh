#!/usr/bin/env bash
# Make the virtual environment $1 with the first Python on the machine that is 3.11 or newer.
set -euo pipefail

target=$1
PATH=$(printf %s "$PATH" | tr ':' '\n' | grep -vxF "$(realpath -m "$target")/bin" | paste -sd :)  # not itself
python=
for name in python3 python3.14 python3.13 python3.12 python3.11 python; do
    if "$name" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
        python=$(command -v "$name")
        break
    fi
done
if [ -z "$python" ]; then
    echo "Python 3.11 or newer is needed; none was found. Install it (Debian, Ubuntu: apt-get install python3)." >&2
    exit 1
fi

version=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
if ! "$python" -c 'import venv, ensurepip' 2>/dev/null; then
    package="python$version-venv"
    if command -v apt-get >/dev/null && [ "$(id -u)" -eq 0 ]; then
        echo "installing $package"
        apt-get update -qq
        DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "$package" >/dev/null
    else
        echo "$python cannot make virtual environments. Please run:" >&2
        echo "    sudo apt-get install $package" >&2
        exit 1
    fi
fi

echo "making $target with $python (Python $version)"
"$python" -m venv "$target"
