# SPDX-License-Identifier: Apache-2.0
"""Drop-ins for other libraries, one module each, which need that library installed."""
