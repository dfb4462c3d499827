"""What a person asked in a row: read again from its line, because token ids don't say where turns begin."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from eulerforge.data.files import find_files
from eulerforge.data.read import BadRows, read_rows
from eulerforge.data.rows import ChatRow, RowParser
from eulerforge.data.tokenized import TokenizedRows

if TYPE_CHECKING:
    from eulerforge.config.schema import DataConfig


def question_of(rows: TokenizedRows, index: int, config: DataConfig, tokenizer: Any) -> str | None:
    """The last thing that the user says before the first answer of a row that is trained.

    None for a row without turns, and where the prompt does not hold it: cut short, or the file has changed since.
    """
    if config.format == "processed":
        return None
    file_index, place = rows.origin(index)
    (file,) = find_files([rows.files[file_index]])
    prompt = tokenizer.decode(rows.prompt(index).tolist(), skip_special_tokens=True)
    parser, bad = RowParser(config.schema), BadRows()
    for source in read_rows(file, bad):
        if source.place >= place:
            row = parser.parse(source, bad) if source.place == place else None
            return _asked(row, prompt) if isinstance(row, ChatRow) else None
    return None


def _asked(row: ChatRow, prompt: str) -> str | None:
    """What the prompt asks; answers that it holds itself are earlier ones, which are not trained."""
    said, asked = "", None
    for message in row.messages:
        if message.role == "user":
            said = message.content.strip()
        elif message.role == "assistant":
            asked = said if said and said in prompt else asked
            if message.content.strip() not in prompt:
                break
    return asked
