# Copyright 2026 The modeling_t3d authors.
# Licensed under the Apache License, Version 2.0; see the LICENSE file.
"""T3D: 3D medical vision-language pre-training for Hugging Face Transformers."""

__version__ = "0.1.0"
