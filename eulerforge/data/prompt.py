"""What generation starts from: a prompt as text and as the same tokens that its training row begins with."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from jinja2 import TemplateError

from eulerforge.data.chat_template import NO_TEMPLATE_HINT
from eulerforge.data.read import BadRows, SourceRow
from eulerforge.data.render import Rendered, Renderer
from eulerforge.data.rows import ProcessedRow, Row, RowParser, TextRow
from eulerforge.data.tokenize import RowTokenizer
from eulerforge.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from eulerforge.config.schema import DataConfig


def render_prompt(
    tokenizer: PreTrainedTokenizerBase, config: DataConfig, row_or_text: str | Mapping[str, Any]
) -> list[int]:
    """Token ids of what generation starts from: a token prefix of the same row's training tokens.

    Text counts as ``{"prompt": text}``. A row's answers may be absent; of a conversation that ends with an answer, the
    turns before that answer. Raises DataError for what is no row.
    """
    given = {"prompt": row_or_text} if isinstance(row_or_text, str) else dict(row_or_text)
    parser = RowParser({} if isinstance(row_or_text, str) else config.schema)
    bad = BadRows()
    row = parser.parse(SourceRow(parser.with_blank_answer(given), 0, "prompt"), bad)
    if row is None:
        raise bad.error()
    return RowTokenizer(tokenizer).prompt(asked_of(Renderer(config, tokenizer), row))


def asked_of(renderer: Renderer, row: Row) -> Rendered:
    """The text before the last answer of a row; all of a text row."""
    if isinstance(row, TextRow):
        return Rendered(row.text, (), row.where)
    if isinstance(row, ProcessedRow):
        raise DataError(
            "a row of token ids has no text to start from",
            source=row.where,
            hint="give rows of text, of a prompt and its response, or of messages",
        )
    turns = row.messages[:-1] if row.messages[-1].role == "assistant" else row.messages
    try:
        return renderer.prompt(turns, row.separator)
    except (TemplateError, TypeError, ValueError, KeyError) as error:
        raise DataError(
            f"the chat template refuses this prompt: {error}", key="data.template", hint=NO_TEMPLATE_HINT
        ) from error
