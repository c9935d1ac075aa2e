# Sourced by the scripts in this folder, so that they also work without an activated environment.

# Print the interpreter to use: PYTHON if set, otherwise the first one with grootvl_mm and torch among `python` and
# `python3` (an activated environment), the environments of this checkout (make setup), and the environment where this
# folder is installed.
find_python() {
    local folder candidate tried=()
    if [[ -n ${PYTHON:-} ]]; then
        echo "$PYTHON"
        return
    fi
    folder=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
    # `python -c` searches the current folder for modules, but `python tools/train.py` does not.
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
    echo "error: no Python with grootvl_mm and torch found (tried: ${tried[*]:-none});" \
        "activate its environment or set PYTHON=/path/to/python" >&2
    return 1
}
