# shellcheck shell=bash disable=SC2034
# Sourced by the scripts of this folder: where things are, messages, steps that are done once, and the mounts of the tree.

VM=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd -P)
CLONE=${VM%/bench/vm}

# The kernel series, as in linux-source-$SERIES. The newest revision that Debian has of it is taken.
SERIES=${SERIES:-7.3}
CACHE=${XDG_CACHE_HOME:-$HOME/.cache}/hmm-gpu

# The name of a thing that takes long to make holds a hash of what it is made from: it is there and right, or not there.
key_of() { cat -- "$@" | sha256sum | cut -c1-12; }
TREE=$CACHE/tree-$(key_of "$VM/packages" "$VM/make-tree")
KERNEL_STAMP=$TREE/var/lib/hmm-gpu/kernel-$SERIES-$(key_of "$VM/make-kernel")

# Seconds count from the first of our scripts that was called, not from each.
: "${HMM_GPU_BEGIN:=$EPOCHSECONDS}"
export SERIES HMM_GPU_BEGIN
log() { printf '[%4ds] %s\n' $((EPOCHSECONDS - HMM_GPU_BEGIN)) "$*" >&2; }
die() { log "$@"; exit 1; }

need_root() {
    [[ $EUID = 0 ]] || die "this needs root: it makes a Debian tree, and mounts and changes root into it"
}

# long_step LOG PROGRESS CMD...: run CMD with its output in the file LOG. Every ten seconds say how far it is: what the command
# PROGRESS prints, then the last line of output. When CMD fails, show the end of LOG. It ends with this script.
long_step() {
    local file=$1 progress=$2 status=0 waited=0
    shift 2
    # Job control gives it a process group, so that all of it can be ended.
    set -m
    "$@" >"$file" 2>&1 </dev/null &
    STEP_PID=$!
    set +m
    trap 'kill -TERM -- "-$STEP_PID" 2>/dev/null; wait "$STEP_PID" || true; exit 143' INT TERM HUP
    while kill -0 "$STEP_PID" 2>/dev/null; do
        sleep 0.5
        (( ++waited % 20 )) || log "    $($progress): $(tail -n 1 "$file" | tr -d '\r' | cut -c1-100)"
    done
    wait "$STEP_PID" || status=$?
    trap - INT TERM HUP
    if [[ $status != 0 ]]; then
        tail -n 30 "$file" >&2
        die "failed with status $status; the whole output is in $file"
    fi
}

# The checking kernel, by what it is made from: sets DEBUG, its folder, which is also the prepared tree for building modules.
# The tree counts by its compilers only, since the rest of it makes no difference to a kernel.
name_debug_kernel() {
    local made_by
    made_by=$(dpkg-query --admindir="$TREE/var/lib/dpkg" --show 'clang*' 'lld*' 'llvm*' 'rustc*' bindgen)
    DEBUG=$CACHE/debug-$(key_of "$VM/debug.config" "$VM/make-debug-kernel" "$KERNEL_STAMP" - <<<"$made_by")
}

# hold FOLDER: keep a folder of the cache. Its users hold a shared lock on it for as long as they live, so that nobody removes it
# under them.
hold() {
    local lock
    exec {lock}>>"$1.lock"
    flock --shared "$lock"
    touch -- "$1.lock"
}

# hold_all DEBUG: prepare and hold the tree, and, where DEBUG is 1, the checking kernel too.
hold_all() {
    need_root
    if [[ $1 = 0 ]]; then
        "$VM/prepare"
        hold "$TREE"
    else
        "$VM/prepare" --debug
        hold "$TREE"
        name_debug_kernel
        hold "$DEBUG"
    fi
}

# The functions below are for a private mount namespace: nothing of them is seen outside, or left when the last process ends.

# mount_tree: make $TREE a place to change root into, with this machine's devices, name service and certificates.
mount_tree() {
    mount --bind -- "$TREE" "$TREE"
    local dir
    for dir in proc dev sys; do mount --rbind "/$dir" "$TREE/$dir"; done
    for dir in tmp run mnt; do mount -t tmpfs -o mode=1777 tmpfs "$TREE/$dir"; done
    for dir in /etc/resolv.conf /etc/hosts; do
        if [[ -e $dir ]]; then mount --bind "$dir" "$TREE$dir"; fi
    done
    # The host's certificates, where it has a bundle: it may know one that Debian does not.
    if [[ -s /etc/ssl/certs/ca-certificates.crt ]]; then
        for dir in /etc/ssl/certs /usr/share/ca-certificates; do
            if [[ -d $dir ]]; then mount --bind "$dir" "$TREE$dir"; fi
        done
    fi
}

# tree_env: set ENV to the whole environment of a command in the tree, as arguments for env -i.
tree_env() {
    local name value
    ENV=(
        HOME=/tmp PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin LC_ALL=C.UTF-8 CARGO_HOME=/var/cache/cargo
        "TERM=${TERM:-dumb}" "SERIES=$SERIES"
    )
    while IFS= read -r name; do
        value=${!name}
        case $name in
            *_TOKEN) ;;
            CI | http_proxy | https_proxy | ftp_proxy | all_proxy | no_proxy | HTTP_PROXY | HTTPS_PROXY | FTP_PROXY | ALL_PROXY | NO_PROXY)
                ENV+=("$name=$value") ;;
            CARGO_HTTP_* | CARGO_NET_* | CARGO_REGISTR* | CARGO_SOURCE_* | CARGO_TERM_*)
                ENV+=("$name=$value") ;;
            SSL_CERT_FILE | SSL_CERT_DIR | CURL_CA_BUNDLE)
                # A bundle elsewhere on the host is copied to where the tree can be written.
                if [[ $value != /etc/ssl/certs* && -e $value ]]; then
                    cp -rL -- "$value" "$TREE/run/$name"
                    value=/run/$name
                fi
                ENV+=("$name=$value") ;;
            MAKEFLAGS)
                # A caller's job server cannot be reached from in here (its pipe has a name outside): as many jobs as processors instead.
                if [[ $value = *--jobserver* ]]; then
                    value="$(sed -E 's/ ?-j[0-9]*( |$)/ /; s/--jobserver-[a-z]+=[^ ]*//' <<<"$value") -j$(nproc)"
                fi
                ENV+=("$name=$value") ;;
        esac
    done < <(compgen -e)
}
