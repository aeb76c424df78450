# SPDX-License-Identifier: Apache-2.0
"""Drop-ins for other libraries, one module each; those for diffusers need it installed."""
