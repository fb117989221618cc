"""From text to rows of token ids: sources (`text.py`), rows on disk (`rows.py`), rows on the fly (`stream.py`)."""
