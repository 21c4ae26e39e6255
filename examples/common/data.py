"""Text for the examples: where it comes from, and what is held out of it."""

import hashlib
import os
import socket
import sysconfig
import tokenize
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from examples.common.jsonl import read_rows, read_text, text_of

Document = tuple[str, str]  # name, text

DEFAULT_HUB_DATASET = "allenai/c4"

_SUFFIXES = (".jsonl", ".md", ".py", ".rst", ".txt")
# Third-party packages are not the standard library; its tests are stripped from some
# distributions; encodings and pydoc_data are generated tables and pages, so large
# that a split by file would hang on where they fall.
_NOT_STDLIB = {
    "__pycache__",
    "dist-packages",
    "encodings",
    "idle_test",
    "lib2to3",
    "pydoc_data",
    "site-packages",
    "test",
    "tests",
    "turtledemo",
}
# The configuration of a hub dataset that has several and no default of its own.
_HUB_CONFIGURATIONS = {"allenai/c4": "en"}
_HELD_OUT = 20  # one document of so many
_HUB_HELD_OUT_BYTES = 5_000_000


@dataclass(frozen=True)
class Corpus:
    """Documents to train on, documents to validate on, and where they come from."""

    source: str
    train: tuple[str, ...]
    validation: tuple[str, ...]

    @property
    def sha256(self) -> str:
        """Hash of both splits, in hexadecimal; changes with any text or boundary."""
        digest = hashlib.sha256()
        for split in (self.train, self.validation):
            digest.update(len(split).to_bytes(8, "little"))
            for text in split:
                encoded = text.encode()
                digest.update(len(encoded).to_bytes(8, "little"))
                digest.update(encoded)
        return digest.hexdigest()


def load_corpus(spec: str, hub_bytes: int) -> Corpus:
    """Reads the text that `spec` names and splits it by document.

    Which documents are held out depends on their names alone, so the split is the
    same on every machine that has the same files.

    Args:
      spec: `stdlib`, the sources of Python's own standard library (no download);
        `path:FILE_OR_DIR`, UTF-8 files, a `.jsonl` file having one document a line
        under the key "text"; `hf:OWNER/NAME` or `hf:OWNER/NAME/CONFIGURATION`, a
        dataset streamed from the Hugging Face hub; `auto`, C4 from the hub where it
        can be reached and the standard library otherwise, saying which.
      hub_bytes: of a hub dataset, read about so many bytes of training text; files
        are read whole.

    Raises:
      ValueError: unknown `spec`, nothing to read, text that is not UTF-8, a hub
        dataset that cannot be read.
      OSError: a missing path, a hub that does not answer.
    """
    kind, _, name = spec.partition(":")
    if spec == "auto":
        return _auto(hub_bytes)
    if spec == "stdlib":
        train, validation = _split(stdlib_documents())
    elif kind == "path" and name:
        train, validation = _split(_files(Path(name)))
    elif kind == "hf" and name:
        return _hub(name, hub_bytes)
    else:
        raise ValueError(
            f"Cannot read data {spec!r}: expected auto, stdlib, path:FILE_OR_DIR or"
            " hf:NAME."
        )
    return Corpus(spec, tuple(train), tuple(validation))


def _split(documents: list[Document]) -> tuple[list[str], list[str]]:
    """Holds out one document of twenty, at least one; of a single one, its end."""
    if len(documents) == 1:
        lines = documents[0][1].splitlines(keepends=True)
        cut = len(lines) - max(1, len(lines) // _HELD_OUT)
        return ["".join(lines[:cut])], ["".join(lines[cut:])]
    kept = held_out([name for name, _ in documents])
    train = [text for name, text in documents if name not in kept]
    validation = [text for name, text in documents if name in kept]
    return train, validation


def held_out(names: Sequence[str]) -> set[str]:
    """One name of twenty, at least one; which ones depends on the names alone."""
    by_hash = sorted(names, key=lambda name: hashlib.sha256(name.encode()).digest())
    return set(by_hash[: max(1, len(names) // _HELD_OUT)])


def _take(texts: Iterable[str], limit: int) -> tuple[str, ...]:
    """The first texts, up to and with the one that reaches `limit` bytes."""
    taken, size = [], 0
    for text in texts:
        taken.append(text)
        size += len(text.encode())
        if size >= limit:
            break
    return tuple(taken)


def stdlib_documents() -> list[Document]:
    """Python's own sources, without tests and third-party packages, in order."""
    root = Path(sysconfig.get_paths()["stdlib"])
    documents = []
    for directory, children, files in os.walk(root):
        children[:] = sorted(set(children) - _NOT_STDLIB)
        for file in sorted(files):
            path = Path(directory, file)
            if path.suffix == ".py":
                # Honours the file's own coding line (PEP 263).
                with tokenize.open(path) as source:
                    documents.append((path.relative_to(root).as_posix(), source.read()))
    return documents


def _files(path: Path) -> list[Document]:
    if path.is_file():
        paths = [path]
    elif path.is_dir():
        paths = sorted(p for p in path.rglob("*") if p.suffix in _SUFFIXES)
    else:
        raise FileNotFoundError(f"Cannot read data 'path:{path}': no such path.")
    root = path if path.is_dir() else path.parent
    documents = [
        document
        for file in paths
        for document in _read(file, file.relative_to(root).as_posix())
        if document[1].strip()
    ]
    if not documents:
        raise ValueError(
            f"Cannot read data 'path:{path}': no text in it. A directory is searched"
            f" for {', '.join(_SUFFIXES)} files."
        )
    return documents


def _read(file: Path, name: str) -> list[Document]:
    if file.suffix != ".jsonl":
        return [(name, read_text(file))]
    found = []
    for where, row in read_rows(file):
        number = where.rpartition(" ")[2]
        found.append((f"{name}:{number}", text_of(row, "text", where)))
    return found


def _hub(name: str, train_bytes: int) -> Corpus:
    owner, _, rest = name.partition("/")
    dataset, _, configuration = rest.partition("/")
    dataset = f"{owner}/{dataset}" if dataset else owner
    configuration = configuration or _HUB_CONFIGURATIONS.get(dataset)
    try:
        import datasets
    except ImportError as error:
        raise ValueError(
            f"Cannot read data 'hf:{name}': the package `datasets` is missing. Install"
            " it, or use the data stdlib or path:FILE_OR_DIR."
        ) from error

    def texts(split: str) -> Iterable[str]:
        rows = datasets.load_dataset(
            dataset, configuration, split=split, streaming=True
        )
        for number, row in enumerate(rows, start=1):
            if "text" not in row:
                raise ValueError(f"it has no column 'text' but {', '.join(row)}")
            yield text_of(row, "text", f"{split}, row {number}")

    try:
        train = _take(texts("train"), train_bytes)
        try:
            validation = _take(texts("validation"), _HUB_HELD_OUT_BYTES)
        except ValueError:  # there is no such split
            named = [(str(index), text) for index, text in enumerate(train)]
            train, validation = map(tuple, _split(named))
    except (OSError, ValueError) as error:
        raise ValueError(f"Cannot read data 'hf:{name}': {error}") from error
    label = "/".join(filter(None, (dataset, configuration)))
    return Corpus(f"hf:{label}", train, validation)


def probe_hub() -> None:
    """Tells `datasets`, if it is not yet imported, where the hub does not answer."""
    try:
        socket.create_connection(("huggingface.co", 443), timeout=2).close()
    except OSError:
        # Read by `datasets` when it is imported: without it every request is retried
        # for half a minute before it fails.
        os.environ["HF_HUB_OFFLINE"] = "1"


def _auto(train_bytes: int) -> Corpus:
    probe_hub()
    try:
        corpus = _hub(DEFAULT_HUB_DATASET, train_bytes)
    except ValueError as error:
        print(f"{error} Using the standard library instead.")
        corpus = load_corpus("stdlib", train_bytes)
    print(f"data auto: using {corpus.source}")
    return corpus
