#!/usr/bin/env bash
# Make sure the system has what `make install` and the tests need, as Debian and Ubuntu package it.
#
# Needed to build: a C linker and Rust 1.85 or newer. Needed by tests and demo: qemu-utils, nbdkit,
# ext4 and partition tools, loop devices. With --bench also the peers that `make bench-full` measures.
# As root, what is missing is installed with apt-get. Otherwise the exact command is printed: and what
# the build needs ends the run, what only tests and benchmarks need does not.
set -euo pipefail
PATH="$PATH:$HOME/.cargo/bin:/usr/sbin:/sbin"
for versioned in /usr/lib/rust-1.*/bin; do PATH="$PATH:$versioned"; done

rust_wanted=1.85

has() { command -v "$1" >/dev/null 2>&1; }

# Whether version $1 is at least $2.
at_least() { [ "$(printf '%s\n%s\n' "$2" "$1" | sort -V | head -n 1)" = "$2" ]; }

rust_version() { cargo --version 2>/dev/null | cut -d ' ' -f 2; }

# The first package of cargo that is new enough here; empty if there is none.
cargo_package() {
    local name version
    for name in cargo cargo-web $(apt-cache pkgnames cargo-1. 2>/dev/null | sort -V); do
        version=$(apt-cache policy "$name" 2>/dev/null | sed -n 's/^ *Candidate: *//p')
        if [[ $version =~ ^[0-9] ]] && at_least "${version%%[-+~]*}" "$rust_wanted"; then
            echo "$name"
            return
        fi
    done
}

refuse_rust() {
    {
        echo "Rust $rust_wanted or newer is needed for the native core; $1."
        echo "Install it with rustup (https://rustup.rs), which needs no root, and run make again."
    } >&2
    exit 1
}

build=() tools=() updated=no
if [ "${1:-}" = --bench ]; then
    has openssl || tools+=(openssl)
    has btrfs || tools+=(btrfs-progs)
    has zstd || tools+=(zstd)
    has nbdcopy || tools+=(libnbd-bin)
    has rsync || tools+=(rsync)
    has stunnel || tools+=(stunnel4)
    has borg || tools+=(borgbackup)
    has restic || tools+=(restic)
    has b3sum || tools+=(b3sum)
fi
has cc || build+=(gcc libc6-dev)
has qemu-img && has qemu-io && has qemu-nbd || tools+=(qemu-utils)
has nbdkit || tools+=(nbdkit)
has mkfs.ext4 && has e2fsck && has debugfs || tools+=(e2fsprogs)
has sfdisk || tools+=(fdisk)
has losetup || tools+=(mount)
has unshare || tools+=(util-linux)

if ! has apt-get; then
    has cargo || refuse_rust "there is no cargo"
    [ ${#build[@]} -eq 0 ] || { echo "A C compiler (cc) is needed for the native core: install one." >&2; exit 1; }
    [ ${#tools[@]} -eq 0 ] || echo "Missing for tests, demo and benchmarks (names as on Debian): ${tools[*]}" >&2
else
    if ! has cargo; then
        if [ "$(id -u)" -eq 0 ]; then
            apt-get update -qq
            updated=yes
        fi
        package=$(cargo_package)
        [ -n "$package" ] || refuse_rust "there is no cargo, and no package of that version"
        build+=("$package")
    fi
    missing=("${build[@]}" "${tools[@]}")
    if [ ${#missing[@]} -gt 0 ] && [ "$(id -u)" -eq 0 ]; then
        echo "installing ${missing[*]}"
        [ "$updated" = yes ] || apt-get update -qq
        DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${missing[@]}" >/dev/null
    elif [ ${#missing[@]} -gt 0 ]; then
        echo "Some system packages are missing. Please run:" >&2
        echo "    sudo apt-get install --no-install-recommends ${missing[*]}" >&2
        [ ${#build[@]} -eq 0 ] || exit 1
        echo "The build goes on; tests, demo and benchmarks need them." >&2
    fi
fi

version=$(rust_version || true)
at_least "${version:-0}" "$rust_wanted" || refuse_rust "cargo is ${version:-still missing} here"
