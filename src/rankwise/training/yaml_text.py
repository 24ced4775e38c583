"""YAML as a person writes it: numbers like 1e-3, no key twice, and dotted overrides on top."""

from collections.abc import Mapping
from typing import Any

from rankwise.errors import ConfigError

LONGEST, MOST_VALUES = 1 << 20, 100_000  # characters of a configuration, and values in it once its aliases are followed
DEEPEST = 50  # brackets or indents that are open at once: the scanner's work grows with the square of them

# A scalar that is overridden at a deeper key becomes a mapping first: `method: lora` with method.ratio=8.
_SCALAR_KEY = {"method": "name", "data": "train", "targets": "include"}


def parse_yaml(text: str, where: str) -> Any:
    """YAML in which 1e-3 is a number and a key may stand only once. Raises ConfigError with file and line."""
    import re

    import yaml

    class Loader(yaml.SafeLoader):
        """SafeLoader that refuses doubled keys, and depth before it costs anything."""

        def fetch_more_tokens(self) -> Any:
            if self.flow_level > DEEPEST or len(self.indents) > DEEPEST:
                raise RecursionError
            return super().fetch_more_tokens()

        def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
            seen: set[Any] = set()
            for key_node, _ in node.value if isinstance(node, yaml.MappingNode) else ():
                if not isinstance(key_node, yaml.ScalarNode):
                    raise ConfigError(f"{where}, line {key_node.start_mark.line + 1}: a key must be a plain word, not a list or a mapping")
                key = self.construct_object(key_node, deep=True)
                if key in seen:
                    raise ConfigError(f"{where}, line {key_node.start_mark.line + 1}: key {key!r} stands there twice; remove one")
                seen.add(key)
            return super().construct_mapping(node, deep)

    # YAML 1.1 asks for a dot and a signed exponent, so that 1e-3 and 1e3 would be strings
    number = re.compile(r"[-+]?(\d[\d_]*(\.[\d_]*)?|\.\d[\d_]*)[eE][-+]?\d+")
    Loader.add_implicit_resolver("tag:yaml.org,2002:float", number, list("-+.0123456789"))
    if len(text) > LONGEST:
        raise ConfigError(f"{where} has {len(text)} characters, and a configuration at most {LONGEST}; is it the right file?")
    try:
        plain = yaml.load(text, Loader)
        _size(plain, where)
        return plain
    except RecursionError:
        raise ConfigError(f"{where}: nested too deeply; a configuration has a handful of levels") from None
    except (
        ValueError,
        TypeError,
        KeyError,
        AttributeError,
        OverflowError,
    ) as error:  # a tag or a form that promises a number or a date and does not hold one
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"{where}: not valid YAML: {error}") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark is not None else ""
        problem = getattr(error, "problem", None) or str(error)
        raise ConfigError(f"{where}{line}: not valid YAML: {problem}") from None


def _size(value: Any, where: str) -> None:
    """Refuses what aliases blow up: each is one object here, and as many as it stands for once it is copied."""
    sizes: dict[int, int] = {}
    open_: set[int] = set()

    def of(part: Any) -> int:
        if not isinstance(part, dict | list | tuple | set):
            return 1
        key = id(part)
        if key in open_:
            raise ConfigError(f"{where}: an alias (*name) stands inside the value that it repeats; write the value out")
        if key not in sizes:
            open_.add(key)
            sizes[key] = 1 + sum(map(of, part.values() if isinstance(part, dict) else part))
            open_.discard(key)
            if sizes[key] > MOST_VALUES:
                raise ConfigError(f"{where}: aliases (*name) stand for more than {MOST_VALUES} values; write the values out")
        return sizes[key]

    of(value)


def copy_plain(value: Any) -> Any:
    """Mappings and lists copied all the way down, so that overrides never reach the caller's own."""
    if isinstance(value, Mapping):
        return {key: copy_plain(item) for key, item in value.items()}
    return [copy_plain(item) for item in value] if isinstance(value, list) else value


def apply_override(plain: dict[str, Any], override: str) -> None:
    """Sets one dotted key in place, from text such as 'train.lr=1e-3'. Raises ConfigError for text of another form."""
    name, equals, text = override.partition("=")
    keys = name.strip().split(".")
    if not equals or not all(keys):
        raise ConfigError(f"override {override!r} is not of the form key=value, such as train.lr=1e-3")
    place = plain
    for depth, key in enumerate(keys[:-1]):
        inner = place.get(key)
        if depth == 0 and key in _SCALAR_KEY and inner is not None and not isinstance(inner, dict):
            inner = {_SCALAR_KEY[key]: inner}
        elif inner is None:
            inner = {}
        if not isinstance(inner, dict):
            raise ConfigError(f"override {override!r}: {'.'.join(keys[: depth + 1])}={inner!r} holds no further keys")
        place[key] = inner
        place = inner
    place[keys[-1]] = parse_yaml(text, f"override {override!r}")
