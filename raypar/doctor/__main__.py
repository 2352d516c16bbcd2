"""``python -m raypar.doctor``, also where the command line does not import."""

from __future__ import annotations

import sys

from raypar.doctor import main

sys.exit(main())
