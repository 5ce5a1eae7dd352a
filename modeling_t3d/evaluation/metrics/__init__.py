# Copyright 2026 The modeling_t3d authors.
# Licensed under the Apache License, Version 2.0; see the LICENSE file.
"""Metrics as `evaluate.load(path)` takes them: one file each, which the loader copies and runs elsewhere."""
