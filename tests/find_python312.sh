#!/usr/bin/env bash
# Prints a working python3.12, or exits with 1. PYTHON_LATEST names one; else PATH, pyenv and uv are asked.
for candidate in "${PYTHON_LATEST:-}" python3.12 "$HOME"/.pyenv/versions/3.12.*/bin/python3.12 \
  "$HOME"/.local/share/uv/python/cpython-3.12*/bin/python3.12; do
  [ -n "$candidate" ] || continue
  "$candidate" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 12))' >/dev/null 2>&1 && { command -v "$candidate"; exit 0; }
done
exit 1
