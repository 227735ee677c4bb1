"""``python -m vattn`` is the ``vattn`` command."""

from vattn.cli import main

if __name__ == "__main__":
    main()
