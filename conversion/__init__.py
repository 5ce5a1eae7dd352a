# Copyright 2026 The modeling_t3d authors.
# Licensed under the Apache License, Version 2.0; see the LICENSE file.
"""Converters of checkpoints of other origin, one script per source; the package never imports them."""
