"""`python -m jaxmf_opt` runs the main job."""

from .cli.main import main

if __name__ == "__main__":
    main()
