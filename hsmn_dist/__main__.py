"""`python -m hsmn_dist` is the `hsmn-dist` command."""

from hsmn_dist.cli.main import main

if __name__ == "__main__":
    main()
