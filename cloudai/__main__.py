"""`python -m cloudai` is the `cloudai` command."""

from cloudai.cli import main

if __name__ == "__main__":
    main(prog_name="cloudai")
