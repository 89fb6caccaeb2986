"""`python -m train.reproduction.report`."""

from train.reproduction.report.building import main

if __name__ == "__main__":
    main()
