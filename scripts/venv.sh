# Sourced by the scripts beside it: the project's folder, and the virtual environment in it.
# No forks where the environment is up to date: ./scripts/fleecing passes here on every start.

root=${BASH_SOURCE[0]%/*}/..
[[ $root == /* ]] || root=$PWD/$root
venv=$root/.venv

die() {
    printf '%s: %s\n' "${0##*/}" "$1" >&2
    exit 1
}

# venv_ready KIND: does .venv hold what pyproject.toml asks for now? KIND is `runtime` or `dev`.
# The stamp of a finished installation is a copy of the pyproject.toml that it followed.
venv_ready() {
    local want have
    [[ -x $venv/bin/python && -r $venv/$1.stamp ]] || return 1
    IFS= read -r -d '' want <"$root/pyproject.toml" || true
    IFS= read -r -d '' have <"$venv/$1.stamp" || true
    [[ $want == "$have" ]]
}

# Print a Python that is new enough. Debian's own comes first: it is the one that the packaged peers are made for.
find_python() {
    local candidate
    for candidate in /usr/bin/python3 python3 python3.14 python3.13 python3.12 python3.11; do
        if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            command -v "$candidate"
            return
        fi
    done
    die "Python 3.11 or later is needed, and what is here is: $(python3 --version 2>/dev/null || echo none); install python3"
}

# venv_install KIND TARGET: make .venv where there is none that works, then install TARGET ("." or ".[dev]") in it.
venv_install() {
    local kind=$1 target=$2 python log=$root/.cache/venv.log
    rm -f "$venv/$kind.stamp"
    if ! "$venv/bin/python" -m pip --version >/dev/null 2>&1; then
        python=$(find_python) || exit 1
        "$python" -c 'import ensurepip, venv' 2>/dev/null ||
            die "$python makes no virtual environments; install the package python3-venv (apt-get install python3-venv)"
        "$python" -m venv --clear "$venv" >"$log" 2>&1 || die "cannot make $venv: $(tail -n 1 "$log")"
    fi
    if ! (cd "$root" && .venv/bin/python -m pip install --quiet --disable-pip-version-check --editable "$target") >"$log" 2>&1; then
        tail -n 20 "$log" >&2
        die "pip could not install what pyproject.toml asks for; the end of $log is above"
    fi
    cp "$root/pyproject.toml" "$venv/runtime.stamp"
    [[ $kind == runtime ]] || cp "$root/pyproject.toml" "$venv/$kind.stamp"
}

# ensure_venv KIND TARGET: the environment is ready when this returns. Of several first runs at once, one installs and the others wait.
ensure_venv() {
    venv_ready "$1" && return
    root=$(cd "$root" && pwd) venv=$root/.venv
    command -v flock >/dev/null || die "flock is missing; install the package util-linux"
    { mkdir -p "$root/.cache" && [[ -w $root && -w $root/.cache ]]; } 2>/dev/null ||
        die "cannot write in $root, where the virtual environment .venv belongs; run this once as the owner of that folder"
    {
        flock 9
        if ! venv_ready "$1"; then
            printf '%s: setting up %s, which takes a minute, once\n' "${0##*/}" "$venv" >&2
            venv_install "$1" "$2"
        fi
    } 9>"$root/.cache/venv.lock"
}
