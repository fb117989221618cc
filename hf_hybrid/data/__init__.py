"""From text to rows of token ids: what a recipe says of it (`config`), `text`, `rows` on disk, `stream` on the fly."""
