"""No public name, signature or default changes unnoticed."""

from __future__ import annotations

import difflib

import public_api


def test_the_public_interface_is_the_one_on_file() -> None:
    kept = public_api.KEPT.read_text(encoding="utf-8")
    found = public_api.snapshot()
    changes = difflib.unified_diff(
        kept.splitlines(), found.splitlines(), public_api.KEPT.name, "the package", lineterm=""
    )
    assert found == kept, (
        "the public interface has changed. If that is meant, run `make api`, commit "
        f"tests/{public_api.KEPT.name} and tell of it in CHANGELOG.md:\n" + "\n".join(changes)
    )
