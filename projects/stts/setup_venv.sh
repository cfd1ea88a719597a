# Creates .venv in the project's root, installs the project into it, and activates it.
#   extras=dev,export; source projects/stts/setup_venv.sh
# A second call with the same extras and unchanged requirements installs nothing.
_root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
_extras=${extras:-}
_python=${PYTHON:-}
for _candidate in python3.11 python3.12 python3.13 python3.10 python3; do
    [ -n "$_python" ] && break
    if "$_candidate" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then
        _python=$_candidate
    fi
done
if [ -z "$_python" ]; then
    echo "found no Python 3.10 or newer: install one, or set PYTHON=/path/to/python" >&2
    exit 1
fi
[ -x "$_root/.venv/bin/python" ] || "$_python" -m venv "$_root/.venv"
source "$_root/.venv/bin/activate"
# A stamp for each set of extras records the requirements that are installed.
_wanted=$(cksum < "$_root/setup.cfg")
_stamp="$_root/.venv/installed-${_extras:-plain}"
if [ "$(cat "$_stamp" 2>/dev/null)" != "$_wanted" ]; then
    echo "Installing stts-slowfast${_extras:+ with $_extras} into .venv (PyTorch is about 5.5 GB) ..."
    python -m pip install --quiet --disable-pip-version-check \
        --editable "$_root${_extras:+[$_extras]}"
    echo "$_wanted" > "$_stamp"
fi
unset _root _extras _python _candidate _wanted _stamp
