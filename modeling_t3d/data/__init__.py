# Copyright 2026 The modeling_t3d authors.
# Licensed under the Apache License, Version 2.0; see the LICENSE file.
"""What a model is trained on: phantoms, manifests, stores of prepared volumes and data sets."""
