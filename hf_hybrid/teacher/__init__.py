"""From a name to a teacher that can be trusted: `names`, `loading`, `gguf_file`, `embedded`; `probe` tries one."""
