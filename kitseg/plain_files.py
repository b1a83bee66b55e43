"""Plain values in YAML and JSON files from anybody, which are refused before they take long to read."""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypeVar

import msgspec
import yaml

LARGEST, MOST, DEEPEST = 50_000, 2_000, 30  # bytes, values and levels of a configuration; kitseg's have 5,000, 500, 6
TOO_MANY, LONGEST = f"holds too many values, or more than {DEEPEST} levels of them", 4_000  # characters of a value
LARGEST_JSON = 1 << 24  # bytes; an nnU-Net dataset's file lists all its scans

T = TypeVar("T")


def read_yaml(path: Path, scale: int = 1, aliases: bool = False) -> Any:
    """The plain values of a YAML file.

    scale: how many times as large as a configuration it may be; aliases: whether it may hold some, which count with all
    the values that they stand for.

    Raises:
        OSError: it can't be read. ValueError: not YAML, larger than any configuration, or with tags or aliases, by
            which a small text can become objects or a huge value.
    """
    try:
        loader = _Bounded(_content(path, scale * LARGEST).decode())
        loader.left, loader.sizes = scale * MOST, {} if aliases else None
        return loader.get_single_data()
    except (yaml.YAMLError, RecursionError, ArithmeticError, AttributeError, LookupError) as error:  # PyYAML's tags
        raise ValueError(" ".join(str(error).split())) from error


def read_json(path: Path, kind: type[T]) -> T:
    """The content of a JSON file as a type that msgspec knows; keys that the type doesn't have are ignored.

    Raises:
        OSError: it can't be read. ValueError: not JSON, of another type, too large or too deep.
    """
    try:
        return msgspec.json.decode(_content(path, LARGEST_JSON), type=kind)
    except (msgspec.MsgspecError, RecursionError) as error:
        raise ValueError(" ".join(str(error).split())) from error


def _content(path: Path, largest: int) -> bytes:
    if path.exists() and not path.is_file():
        raise ValueError("it is not a file")
    with path.open("rb") as file:
        data = file.read(largest + 1)
    if len(data) > largest:
        raise ValueError(f"it has more than {largest} bytes")
    return data


class _Bounded(yaml.SafeLoader):  # type: ignore[misc]  # PyYAML has no types
    left = depth = 0  # values that it may still hold, levels above the current one
    sizes: dict[str, int] | None = None  # values below each anchor; None where aliases are refused

    def compose_node(self, parent: Any, index: Any) -> Any:
        event, before = self.peek_event(), self.left
        if alias := isinstance(event, yaml.AliasEvent):
            if self.sizes is None or event.anchor not in self.sizes:
                raise ValueError("it holds an alias")
            self.left -= self.sizes[event.anchor]
        self.left, self.depth = self.left - 1, self.depth + 1
        if self.left < 0 or self.depth > DEEPEST:
            raise ValueError(f"it {TOO_MANY}")
        node = super().compose_node(parent, index)
        if isinstance(node, yaml.ScalarNode) and len(node.value) > LONGEST:
            raise ValueError(f"it holds a value of {len(node.value)} characters")
        if event.anchor and self.sizes is not None and not alias:
            self.sizes[event.anchor] = before - self.left
        self.depth -= 1
        return node
