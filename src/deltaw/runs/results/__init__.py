"""Results of runs, as typed values and as the files that hold them. Knows no models."""

from __future__ import annotations

from typing import Any, TypeAlias

JsonObject: TypeAlias = dict[str, Any]
"""An object of a JSON file, as `json.loads` gives it. Its values are typed by the `from_json` that reads them."""
