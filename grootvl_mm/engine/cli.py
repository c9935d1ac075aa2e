"""Old import path of :mod:`grootvl_mm.apis.cli`."""

import sys

from grootvl_mm.apis import cli

sys.modules[__name__] = cli
