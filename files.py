"""Bytes in, records out: each record is a dict of fields, and comes with the place where it stands.

A source is a file, a folder that `save_to_disk` of `datasets` wrote, or a hub dataset. Text is not
read by `datasets`: Arrow's readers turn strings that look like dates into dates and long numbers
into floats, fail where the type of a field changes late in the file, and forget the lines.
Left out on purpose: guessing an encoding (an error names the probable one), archives of many files.

    python -c "from files import read_records; print(*read_records('examples/my_data.jsonl'))"
"""

import bz2
import csv
import glob
import gzip
import io
import itertools
import json
import logging
import lzma
import re
import zlib
from pathlib import Path

from cli import UserError, first_line

ENDINGS = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet", ".txt")
PACKED = (".gz", ".bz2", ".xz", ".zst")
# The fields by which a record is known.
PROMPT_FIELDS = ("prompt", "instruction", "question", "query", "input", "inputs")
TARGET_FIELDS = ("target", "completion", "response", "output", "answer", "targets")
DIALOGUE_FIELDS = ("messages", "conversations", "conversation")
PAIR_FIELDS = ("chosen", "rejected")
RECORD_FIELDS = (*PROMPT_FIELDS, *TARGET_FIELDS, *DIALOGUE_FIELDS, *PAIR_FIELDS, "turns", "text")
# Where records stand in a document that is one object.
WRAPPERS = ("data", "train", "examples", "rows", "records", "instances")
# Fields of messages: tables fill what one message has and another lacks with nulls.
NESTED = (*DIALOGUE_FIELDS, *PAIR_FIELDS, "prompt", "completion", "history", "tools")


def read_records(
    source: str | list[str],
    limit: int | None = None,
    encoding: str = "utf-8",
    config: str | None = None,
    split: str = "train",
    what: str = "--data",
):
    """Yield the records of `placed_records` without their places."""
    for _, record in placed_records(source, limit, encoding, config, split, what):
        yield record


def placed_records(
    source: str | list[str],
    limit: int | None = None,
    encoding: str = "utf-8",
    config: str | None = None,
    split: str = "train",
    what: str = "--data",
):
    """Yield (place, record) for at most `limit` records of one source or of several.

    A source may be a pattern such as `data/*.jsonl`. A place is `file:line` where records are
    lines, else `source, record n`. `what` is the flag that errors name. Raises UserError that names
    the file, and the line where there is one.
    """
    names = [source] if isinstance(source, str) else source
    paths = [path for name in names for path in _matches(name, what)]
    parts = (_source_records(path, limit, encoding, config, split, what) for path in paths)
    yield from itertools.islice(itertools.chain.from_iterable(parts), limit)


def _matches(name: str, what: str) -> list[str]:
    """The files that a pattern names, sorted; any other name stands for itself."""
    if not glob.has_magic(name) or Path(name).exists():
        return [name]
    paths = sorted(glob.glob(name, recursive=True))
    if not paths:
        raise UserError(f"{what} {name} matches no file")
    return paths


def _source_records(source: str, limit, encoding: str, config, split: str, what: str):
    path = Path(source)
    ending = _ending(path)
    if path.is_dir():
        records = _folder_records(path, split, what)
    elif path.is_file() and ending not in ENDINGS:
        known = f"{', '.join(ENDINGS)}, and these with {', '.join(PACKED)}"
        raise UserError(f"{what} {source} has an unknown ending; known are {known}")
    elif path.is_file() and ending == ".parquet":
        records = _parquet_records(path, what)
    elif path.is_file():
        return _text_file_records(path, ending, encoding, split, what)
    elif ending in ENDINGS:
        raise UserError(f"{what} {source} does not exist")
    else:
        records = _hub_records(source, limit, config, split, what)
    return ((f"{source}, record {n}", record) for n, record in enumerate(records, start=1))


def _ending(path: Path) -> str:
    """The ending of the name, in lower case; before it stands the one of a packed file."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    packed = suffixes[-1:] and suffixes[-1] in PACKED
    return suffixes[-2] if packed and len(suffixes) > 1 else "".join(suffixes[-1:])


def _text_file_records(path: Path, ending: str, encoding: str, split: str, what: str):
    """(place, record) of a file that holds text."""
    text = _checked_text(path, encoding, what)
    if ending in (".csv", ".tsv"):
        numbered = _csv_records(path, text, "\t" if ending == ".tsv" else ",")
    elif ending == ".txt":
        numbered = _plain_records(text)
    elif _is_lines(text, ending):
        numbered = _line_records(path, text)
    else:
        numbered = _document_records(path, text, split)
    for n, (line, record) in enumerate(numbered, start=1):
        yield f"{path}, record {n}" if line is None else f"{path}:{line}", record


# ------------------------------------------------------------------------------------ bytes to text


def _checked_text(path: Path, encoding: str, what: str) -> str:
    """The text of a file. Raises UserError that names byte and line of what is not `encoding`."""
    raw = _unpacked(path, what)
    if not raw.strip():
        raise UserError(f"{what} {path} is empty")
    if encoding.lower() in ("utf-8", "utf8"):
        encoding = "utf-8-sig"  # drops a byte order mark
    try:
        text = raw.decode(encoding)
        if encoding != "utf-8-sig" or "\0" not in text or _zero_half(raw) is None:
            return text
        offset = raw.index(b"\0")  # utf-16 without a byte order mark is utf-8 too
    except UnicodeDecodeError as problem:
        offset = problem.start
    except LookupError:
        raise UserError(f"--encoding {encoding} is not an encoding that Python knows") from None
    line = raw[:offset].count(b"\n") + 1
    bad_byte = f"byte 0x{raw[offset]:02x} at offset {offset}"
    raise UserError(
        f"{path}:{line}: {bad_byte} is not {encoding.removesuffix('-sig')}; "
        f"name the file's encoding, probably --encoding {_probable_encoding(raw)}"
    )


def _unpacked(path: Path, what: str) -> bytes:
    """The bytes of a file, decompressed if its name says so. A file that is cut is an error."""
    unpackers = {".gz": gzip.decompress, ".bz2": bz2.decompress, ".xz": lzma.decompress}
    packing = path.suffix.lower()
    if packing == ".zst":
        unpackers[packing] = _zstd_unpacker(path, what)
    try:
        raw = path.read_bytes()
        return unpackers[packing](raw) if packing in unpackers else raw
    except (OSError, EOFError, ValueError, zlib.error, lzma.LZMAError) as problem:
        reason = getattr(problem, "strerror", None) or first_line(problem)
        raise UserError(f"{what} {path} cannot be read: {reason}") from None


def _zstd_unpacker(path: Path, what: str):
    try:
        import zstandard
    except ImportError:
        raise UserError(f"{what} {path} needs a package: pip install zstandard") from None

    def unpack(raw: bytes) -> bytes:
        parts = []
        while raw:  # a file may have several frames
            frame = zstandard.ZstdDecompressor().decompressobj()
            try:
                parts.append(frame.decompress(raw))
            except zstandard.ZstdError as problem:
                raise ValueError(first_line(problem)) from None
            if not frame.eof:
                raise EOFError("the file ends before its last frame does")
            raw = frame.unused_data
        return b"".join(parts)

    return unpack


def _probable_encoding(raw: bytes) -> str:
    """What bytes that are not utf-8 probably are."""
    if raw.startswith((b"\xff\xfe\0\0", b"\0\0\xfe\xff")):
        return "utf-32"
    if raw.startswith((b"\xff\xfe", b"\xfe\xff")):
        return "utf-16"
    if _zero_half(raw) is not None:
        return _zero_half(raw)
    for name in ("utf-8", "cp1252"):
        # latin-1 has no letters at 0x80 to 0x9f; cp1252 has quotes and dashes there.
        if name == "utf-8" or re.search(rb"[\x80-\x9f]", raw):
            try:
                raw.decode(name)
            except UnicodeDecodeError:
                continue
            return name
    return "latin-1"


def _zero_half(raw: bytes) -> str | None:
    """The name of utf-16 where every second byte is mostly zero, as in Western texts."""
    for first, name in ((1, "utf-16-le"), (0, "utf-16-be")):
        half = raw[first:4000:2]
        if half.count(0) > len(half) / 2:
            return name
    return None


# ------------------------------------------------------------------------------------ JSON and text


def _is_lines(text: str, ending: str) -> bool:
    """Is each line of the text an object? Else the text is one document, or some, over many lines.

    The first line is a complete object then, or the second one if the first is broken.
    """
    if text.lstrip().startswith("["):
        return False
    lines = [match.group() for match in itertools.islice(re.finditer(r".*\S.*", text), 2)]
    if ending == ".json" and len(lines) == 1:
        return False
    if any(_is_object(line) for line in lines[:1]):
        return True
    return any(_is_object(line) for line in lines[1:]) and not _is_object(text)


def _is_object(text: str) -> bool:
    try:
        return text.lstrip().startswith("{") and isinstance(json.loads(text), dict)
    except (json.JSONDecodeError, RecursionError):
        return False


def _line_records(path: Path, text: str):
    """One object a line. Raises UserError that names the line."""
    for line, document in enumerate(text.split("\n"), start=1):
        if not document.strip():
            continue
        try:
            record = json.loads(document)
        except json.JSONDecodeError as problem:
            raise _json_error(path, problem, line - 1) from None
        except RecursionError:
            raise UserError(f"{path}:{line}: not usable JSON (nested too deeply)") from None
        if not isinstance(record, dict):
            kind = type(record).__name__
            raise UserError(f"{path}:{line}: expected a JSON object, found {kind}")
        yield line, record


def _document_records(path: Path, text: str, split: str):
    """The records of whole documents: arrays, or objects that may hold many records."""
    decoder, start = json.JSONDecoder(), 0
    while True:
        start = re.compile(r"\s*").match(text, start).end()
        if start == len(text):
            return
        line = text.count("\n", 0, start) + 1
        try:
            document, start = decoder.raw_decode(text, start)
        except json.JSONDecodeError as problem:
            raise _json_error(path, problem) from None
        except RecursionError:
            raise UserError(f"{path}:{line}: not usable JSON (nested too deeply)") from None
        records = unwrapped(document, split) if isinstance(document, dict) else document
        for record in records if isinstance(records, list) else [records]:
            if not isinstance(record, dict):
                kind = type(record).__name__
                raise UserError(f"{path}:{line}: expected a JSON object, found {kind}")
            yield None, record


def _json_error(path: Path, problem: json.JSONDecodeError, lines_before: int = 0) -> UserError:
    where = f"{path}:{lines_before + problem.lineno}"
    return UserError(f"{where}: not valid JSON ({problem.msg}, column {problem.colno})")


def unwrapped(document: dict, split: str = "train") -> list[dict]:
    """The records that an object holds: itself, or those of a wrapper, of columns, of a table.

    >>> unwrapped({"prompt": ["p", "q"], "target": ["t", "u"]})
    [{'prompt': 'p', 'target': 't'}, {'prompt': 'q', 'target': 'u'}]
    """
    values = list(document.values())
    if not any(name in document for name in RECORD_FIELDS):
        for name in (split, *WRAPPERS):
            if _are_objects(document.get(name)):
                return document[name]
        if isinstance(document.get("columns"), list) and isinstance(document.get("data"), list):
            return [dict(zip(document["columns"], row)) for row in document["data"]]
        if _are_objects(values) and all(set(value) & set(RECORD_FIELDS) for value in values):
            return values  # a record under each key
    if _are_objects(values) and _same_numbers(values):  # as pandas writes a table
        return [{name: column[i] for name, column in document.items()} for i in values[0]]
    is_table = values and all(isinstance(value, list) for value in values)
    if is_table and len({len(value) for value in values}) == 1 and not _holds_turns(document):
        return [dict(zip(document, row)) for row in zip(*values)]
    return [document]


def _are_objects(value) -> bool:
    return isinstance(value, list) and value != [] and all(isinstance(v, dict) for v in value)


def _same_numbers(columns: list[dict]) -> bool:
    """Have all columns the same keys, which are whole numbers?"""
    keys = columns[0].keys()
    return all(key.isdecimal() for key in keys) and all(c.keys() == keys for c in columns)


def _holds_turns(record: dict) -> bool:
    """Is a field that is a list in one record, the turns of a dialogue, such a list?"""
    firsts = [record[name][0] for name in NESTED if record.get(name)]
    is_message = any(isinstance(v, dict) and ("role" in v or "from" in v) for v in firsts)
    return is_message or (bool(record.get("turns")) and isinstance(record["turns"][0], str))


def _plain_records(text: str):
    """Split at `<|endoftext|>` if the file has it, else at line breaks; blank texts are dropped."""
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    is_lines = "<|endoftext|>" not in text
    pieces = text.split("\n" if is_lines else "<|endoftext|>")
    for line, piece in enumerate(pieces, start=1):
        if piece.strip():
            yield line if is_lines else None, {"text": piece.strip()}


# ------------------------------------------------------------------------------------------- tables


def _csv_records(path: Path, text: str, delimiter: str):
    """Every cell is text, "42", "None" and "007" too; a field whose cell is empty is absent."""
    csv.field_size_limit(2**31 - 1)
    header_line = text.lstrip().partition("\n")[0]
    if delimiter == "," and "," not in header_line:
        delimiter = next((mark for mark in ";\t" if mark in header_line), ",")
    rows = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    names, line = None, 1
    while True:
        line = rows.line_num + 1  # where the next row begins
        try:
            row = next(rows, None)
        except csv.Error as problem:
            advice = f"quote a cell with {delimiter!r} or a line break, double the quotes in it"
            raise UserError(f"{path}:{line}: {problem} ({advice})") from None
        if row is None:
            return
        if not any(row):
            continue
        if names is None:
            names = _column_names(f"{path}:{rows.line_num}", row)
            continue
        if any(row[len(names) :]):
            found = f"{len(row)} cells, but the header names {len(names)} columns"
            raise UserError(f"{path}:{rows.line_num}: {found}; quote a cell with {delimiter!r}")
        yield rows.line_num, {name: cell for name, cell in zip(names, row) if name and cell}


def _column_names(place: str, header: list[str]) -> list[str]:
    """The names of the columns; "" for one that has none, as the index that pandas writes."""
    names = [name.strip("\ufeff \t\r\n") for name in header]
    names = ["" if re.fullmatch(r"Unnamed: \d+(\.\d+)?", name) else name for name in names]
    for name in names:
        if name and names.count(name) > 1:
            raise UserError(f"{place}: the header names the column {name!r} twice")
    return names


def _folder_records(path: Path, split: str, what: str):
    """The records of a folder that `save_to_disk` of `datasets` wrote."""
    if (path / "dataset_dict.json").is_file():
        names = sorted(state.parent.name for state in path.glob("*/state.json"))
        if split not in names:
            raise UserError(
                f"{what} {path} has no split {split!r}; "
                f"give --data-split one of {', '.join(names) or 'none'}"
            )
        path = path / split
    if not (path / "state.json").is_file():
        found = [e for e in ENDINGS if any(_ending(file) == e for file in path.iterdir())]
        advice = f", or all of them as '{path}/*{found[0]}'" if found else ""
        raise UserError(f"{what} {path} is a folder; give a file in it{advice}")

    def load(datasets):
        return datasets.load_from_disk(str(path))

    return _dataset_records((f"{what} {path} cannot be read: ", ""), load)


def _hub_records(source: str, limit: int | None, config: str | None, split: str, what: str):
    unreachable = "is no local file and could not be fetched from the Hugging Face hub"
    advice = (
        "check the name, --data-config, --data-split and the network, "
        "give a file, or use the built-in --data reviews"
    )

    def load(datasets):
        return datasets.load_dataset(source, config, split=split, streaming=limit is not None)

    return _dataset_records((f"{what} {source} {unreachable} (", f"); {advice}"), load)


def _dataset_records(error: tuple[str, str], load):
    """The records of the dataset that `load(datasets)` gives; images and sounds stay bytes.

    Raises UserError: `error` is what it says before and after the reason that `datasets` gives.
    """
    import datasets  # slow to import, and files do not need it

    datasets.logging.set_verbosity(logging.CRITICAL)
    # Only the result matters, not the hub's messages about its retries.
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    try:
        for table in load(datasets).with_format("arrow").iter(batch_size=1000):
            yield from _table_records(table)
    except (OSError, ValueError, KeyError, TypeError, datasets.exceptions.DatasetsError) as problem:
        raise UserError(error[0] + first_line(problem) + error[1]) from None


def _parquet_records(path: Path, what: str):
    import pyarrow.parquet  # slow to import too; comes with datasets

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=1000):
                yield from _table_records(batch)
    except (OSError, pyarrow.ArrowException) as problem:
        raise UserError(f"{what} {path} cannot be read: {first_line(problem)}") from None


def _table_records(table) -> list[dict]:
    """The rows of an Arrow table. In messages, a null only says that another message has a field.

    Where content is null it is absent; a reader of messages decides what that means.
    """
    rows = table.to_pylist()
    for name in set(NESTED) & set(table.column_names):
        for row in rows:
            row[name] = _without_nulls(row[name])
    return rows


def _without_nulls(value):
    if isinstance(value, dict):
        return {key: _without_nulls(v) for key, v in value.items() if v is not None}
    if isinstance(value, list):
        return [_without_nulls(v) for v in value]
    return value
