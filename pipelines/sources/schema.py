"""What one schema has otherwise than another, in words."""

from collections.abc import Mapping


def differences(wanted: Mapping[str, str], seen: Mapping[str, str], *, in_order: bool = True) -> list[str]:
    """Columns of `seen` that were added, dropped, renamed, retyped or moved against `wanted`; both map names to types.

    A column that stands, with the same type, where another is missing was perhaps renamed.
    """
    dropped = [name for name in wanted if name not in seen]
    added = [name for name in seen if name not in wanted]
    places = {name: place for place, name in enumerate(wanted)}
    renamed = {}
    for place, name in enumerate(seen):
        for old in dropped:
            if name in added and old not in renamed and places[old] == place and wanted[old] == seen[name]:
                renamed[old] = name
    found = [f"{old!r} renamed to {new!r}" for old, new in renamed.items()]
    found += [f"{name!r} dropped" for name in dropped if name not in renamed]
    found += [f"{name!r} added" for name in added if name not in renamed.values()]
    both = [name for name in wanted if name in seen]
    found += [f"{name!r} {wanted[name]} became {seen[name]}" for name in both if wanted[name] != seen[name]]
    if in_order and both != [name for name in seen if name in wanted]:
        found.append(f"reordered to {', '.join(seen)}")
    return found
