# Sourced by the scripts beside it, which then run in an environment that nobody has activated, too.

# Print the interpreter that has grootvl_mm and torch: PYTHON, taken as it is, or else the first that has them of
# `python` and `python3` (an activated environment), the environments of this checkout (make setup), and the environment
# where this folder is installed.
find_python() {
    local folder candidate tried=()
    if [[ -n ${PYTHON:-} ]]; then
        echo "$PYTHON"
        return
    fi
    folder=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
    # The current folder counts with `python -c`, but not with `python tools/train.py`.
    local has_package='
import sys
from importlib.util import find_spec

sys.path[:] = filter(None, sys.path)
sys.exit(not (find_spec("grootvl_mm") and find_spec("torch")))'
    for candidate in python python3 "$folder"/../.venv*/bin/python "$folder"/../../../../../../bin/python; do
        candidate=$(command -v "$candidate") || continue
        tried+=("$candidate")
        if "$candidate" -c "$has_package" 2>/dev/null; then
            echo "$candidate"
            return
        fi
    done
    echo "error: no Python found that has grootvl_mm and torch (tried: ${tried[*]:-none});" \
        "activate its environment or set PYTHON=/path/to/python" >&2
    return 1
}
