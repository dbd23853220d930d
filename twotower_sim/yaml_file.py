"""YAML files into frozen models, with errors that name file, line, key, what was found and what is allowed."""

import re
from collections.abc import Callable, Iterable, Mapping
from copy import deepcopy
from difflib import get_close_matches
from pathlib import Path, PurePath
from typing import Annotated, Any, ClassVar, Literal, TypeVar, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError

from twotower_sim.errors import InputError

Model = TypeVar("Model", bound=BaseModel)
Keys = tuple[str | int, ...]


class _Loader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]
    """Safe YAML in which plain words mean what YAML 1.2 says. To PyYAML 1e-5 is text, 010 is 8, 1:30 is 90 and no is
    false; here 1e-5 is a number and the others are text."""

    yaml_implicit_resolvers: ClassVar[dict[str, list]] = {}


for _tag_name, _pattern, _first in (
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"[-+]?(0|[1-9][0-9]{0,18})", list("-+0123456789")),
    ("float", r"[-+]?(\.[0-9]+|[0-9]+\.[0-9]*|(0|[1-9][0-9]*)(?=[eE]))([eE][-+]?[0-9]+)?", list("-+.0123456789")),
    ("float", r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)", list("-+.")),
):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag_name}", re.compile(f"^({_pattern})$"), _first)


class Document:
    """A mapping, and where each of its values stands. Files that it names are relative to the folder of ``path``."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.data: Any = {}
        self._where: dict[Keys, str] = {}

    @classmethod
    def of_text(cls, path: Path, text: str) -> "Document":
        """Of a YAML file. Raises InputError."""
        document = cls(path)
        return document._holding(document._read(text, (), lambda line: f"{path}:{line}"))

    @classmethod
    def of_data(cls, path: Path, data: Any) -> "Document":
        """Of what stands in no file, as if it stood at ``path``. Raises InputError for what no file holds."""
        try:
            return cls(path)._holding(_plain(data, str(path)))
        except RecursionError:
            raise InputError(f"{path}: is nested too deeply") from None

    def part(self, *keys: str | int) -> "Document":
        """A document of its own of the section that stands at ``keys``; without keys, a copy."""
        part, data = Document(self.path.with_name(f"<{keys[-1]}>") if keys else self.path), self.data
        for key in keys:
            data = data[key]
        part._where = {at[len(keys) :]: line for at, line in self._where.items() if at[: len(keys)] == keys}
        return part._holding(deepcopy(data))

    def _holding(self, data: Any) -> "Document":
        if not isinstance(data, dict):
            raise InputError(f"{self.path}: expected a mapping of keys to values at the top level")
        self.data = data
        return self

    def _read(self, text: str, keys: Keys, place: Callable[[int], str]) -> Any:
        """The plain value that stands at ``keys``; ``place`` names a line of the text."""
        try:
            events: Iterable[Any] = yaml.parse(text, Loader=_Loader)
            for alias in (event for event in events if isinstance(event, yaml.AliasEvent)):
                problem = f"the alias *{alias.anchor} is not supported"  # it could make a value endless
                mark: Any = alias.start_mark
                raise yaml.MarkedYAMLError(problem=problem, problem_mark=mark)
            return self._build(yaml.compose(text, Loader=_Loader), keys, place)
        except yaml.MarkedYAMLError as error:
            line = error.problem_mark.line + 1 if error.problem_mark else 1
            raise InputError(f"{place(line)}: not valid YAML: {error.problem}") from None
        except (yaml.YAMLError, ValueError, RecursionError) as error:
            raise InputError(f"{place(1)}: not valid YAML: {error}") from None

    def _build(self, node: yaml.Node | None, keys: Keys, place: Callable[[int], str]) -> Any:
        if node is None:
            return None
        self._where.setdefault(keys, place(node.start_mark.line + 1))
        if isinstance(node, yaml.SequenceNode):
            return [self._build(item, (*keys, i), place) for i, item in enumerate(node.value)]
        if not isinstance(node, yaml.MappingNode):
            return _scalar(node)
        mapping: dict[str, Any] = {}
        for key_node, value in node.value:
            key, line = _scalar(key_node), place(key_node.start_mark.line + 1)
            if not isinstance(key, str):
                raise InputError(f"{line}: key {key!r:.99} is no text")
            if key in mapping:
                raise InputError(f"{line}: {_dotted((*keys, key))} stands twice")
            self._where[(*keys, key)] = line
            mapping[key] = self._build(value, (*keys, key), place)
        return mapping

    def override(self, assignment: str) -> None:
        """Apply ``a.b.c=value``, the value in YAML. A new ``kind`` starts its section afresh."""
        dotted, equals, text = assignment.partition("=")
        keys = tuple(dotted.strip().split("."))
        if not equals or not all(keys):
            raise InputError(f"--set {assignment}: expected section.key=value")
        place = f"--set {assignment}"
        self.put(keys, self._read(text, keys, lambda line: place), place)

    def put(self, keys: Keys, value: Any, place: str) -> None:
        """Set a value; ``place`` says where it is from. A new ``kind`` starts its section afresh."""
        self._forget(keys)
        section = self.data
        for i, key in enumerate(keys[:-1]):
            if section.get(key) is None:
                section[key] = {}
                self._where[keys[: i + 1]] = place
            if not isinstance(section[key], dict):
                raise InputError(f"{place}: {_dotted(keys[: i + 1])} is no section")
            section = section[key]
        if len(keys) > 1 and keys[-1] == "kind" and section.get("kind") != value:
            section.clear()
            self._forget(keys[:-1])
            self._where[keys[:-1]] = place
        section[keys[-1]] = value
        self._where[keys] = place

    def _forget(self, keys: Keys) -> None:
        """Forget where the value at ``keys`` and its parts stand."""
        self._where = {known: line for known, line in self._where.items() if known[: len(keys)] != keys}

    def where(self, keys: Keys) -> str:
        """File and line (or --set) of a value, or of the nearest section around it."""
        while keys and keys not in self._where:
            keys = keys[:-1]
        return self._where[keys] if keys else str(self.path)

    def validate(self, model: type[Model]) -> Model:
        try:
            return model.model_validate(self.data)
        except ValidationError as error:
            raise InputError("\n".join(dict.fromkeys(self._lines(model, error)))) from None

    def _lines(self, model: type[BaseModel], error: ValidationError) -> Iterable[str]:
        for item in error.errors():
            keys, fields = _locate(self.data, model, item["loc"])
            where = self.where((*keys, "kind") if item["type"].startswith("union_tag") else keys)
            yield f"{where}: {_explain(item, keys, fields)}"


Source = Path | Document
"""A file, or what is given as if it were one."""


def path_of(source: Source) -> Path:
    return source if isinstance(source, Path) else source.path


def read_document(source: Source) -> Document:
    """What a file holds, or a copy. Raises InputError."""
    if isinstance(source, Document):
        return source.part()
    try:
        text = source.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{source}: cannot be read: {getattr(error, 'strerror', None) or error}") from None
    return Document.of_text(source, text)


def load_model(model: type[Model], path: Path) -> Model:
    return read_document(path).validate(model)


def _scalar(node: yaml.Node) -> Any:
    loader = _Loader("")
    try:
        value = loader.construct_object(node)
        if isinstance(value, int) and value.bit_length() > 64:
            raise ValueError
        return value
    except (ValueError, LookupError, AttributeError):  # what constructors raise for tags that do not fit, as !!int ''
        problem = f"{node.value!r:.60} is no {node.tag.rpartition(':')[2]}"
        raise yaml.MarkedYAMLError(problem=problem, problem_mark=node.start_mark) from None
    finally:
        loader.dispose()


def _plain(value: Any, place: str) -> Any:
    """As a file gives it; arrays as lists, paths as text."""
    if hasattr(value, "tolist"):  # numpy's and pandas'
        value = value.tolist()
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, str):
                raise InputError(f"{place}: key {key!r:.99} is no text")
        return {key: _plain(of, f"{place}: {key}") for key, of in value.items()}
    if isinstance(value, list | tuple | range):
        return [_plain(of, place) for of in value]
    if isinstance(value, PurePath):
        return str(value)
    if value is None or isinstance(value, str | int | float):
        return value
    raise InputError(f"{place}: found {value!r:.99}; expected text, numbers, True, False, None, lists or mappings")


def _dotted(keys: Keys) -> str:
    return ".".join(map(str, keys))


_OF_UNION = re.compile(r"constrained-|list\[|\[key\]$")
"""How pydantic names the plain members of a union, and that the key of a mapping is wrong."""


def _locate(data: Any, model: Any, loc: tuple[str | int, ...]) -> tuple[Keys, dict[str, Any]]:
    """The document's keys for a pydantic location (which also names union members), and the fields of the
    model around its last key."""
    keys: list[str | int] = []
    fields: dict[str, Any] = {}
    for part in loc:
        members = _models(model)
        tagged = [m for m in members if _tag(m) == part or m.__name__ == part]
        if tagged and (len(members) > 1 or tagged[0].__name__ == part):
            model = tagged[0]
            continue
        if isinstance(part, str) and _OF_UNION.match(part):
            continue
        fields = {name: field for m in members for name, field in _named_fields(m).items()}
        keys.append(part)
        model = fields[part].rebuild_annotation() if part in fields else _element(model)
        data = data.get(part) if isinstance(data, dict) else None
    if loc and not keys:
        fields = {}
    return tuple(keys), fields if loc else _named_fields(model)


def _named_fields(model: type[BaseModel]) -> dict[str, Any]:
    return {field.alias or name: field for name, field in model.model_fields.items()}


def _models(annotation: Any) -> list[type[BaseModel]]:
    """Pydantic models inside an annotation."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    if get_origin(annotation) is Annotated:
        return _models(get_args(annotation)[0])
    if get_origin(annotation) is Union or type(annotation).__name__ == "UnionType":
        return [m for part in get_args(annotation) for m in _models(part)]
    return []


def _element(annotation: Any) -> Any:
    """What a list or mapping holds; None of anything else."""
    if get_origin(annotation) in (list, dict):
        return get_args(annotation)[-1]
    parts = get_args(annotation)[:1] if get_origin(annotation) is Annotated else get_args(annotation)
    return next((found for part in parts if (found := _element(part)) is not None), None)


def _tag(model: type[BaseModel]) -> str | None:
    kind = model.model_fields.get("kind")
    return get_args(kind.annotation)[0] if kind and get_origin(kind.annotation) is Literal else None


def _explain(item: Any, keys: Keys, fields: dict[str, Any]) -> str:
    name, found, context = _dotted(keys), item["input"], item.get("ctx", {})
    if item["type"] == "extra_forbidden":
        return f"{name}: unknown key{did_you_mean(str(keys[-1]), fields)}; allowed: {', '.join(fields)}"
    if item["type"] == "missing":
        return f"{name}: is missing"
    if item["type"] == "union_tag_not_found":
        return f"{name}.kind: is missing; allowed: {context.get('expected_tags') or _tags(fields, keys)}"
    if item["type"] == "union_tag_invalid":
        allowed = [tag.strip().strip("'") for tag in context["expected_tags"].split(",")]
        nearest = did_you_mean(context["tag"], allowed)
        return f"{name}.kind: found {context['tag']!r:.99}; allowed: {', '.join(allowed)}{nearest}"
    if item["type"] == "literal_error":
        allowed = re.findall(r"'([^']*)'", context["expected"])
        return f"{name}: found {found!r:.99}; allowed: {', '.join(allowed)}{did_you_mean(str(found), allowed)}"
    if item["type"] == "value_error":
        return f"{name}: {context['error']}" if name else str(context["error"])
    return f"{name}: found {found!r:.99}; {item['msg'][0].lower()}{item['msg'][1:]}"


def _tags(fields: dict[str, Any], keys: Keys) -> str:
    field = fields.get(str(keys[-1])) if keys else None
    return ", ".join(tag for m in _models(field.rebuild_annotation()) if (tag := _tag(m))) if field else ""


def did_you_mean(name: str, allowed: Iterable[str]) -> str:
    close = get_close_matches(name, list(allowed), 1)
    return f" (did you mean {close[0]}?)" if close else ""
