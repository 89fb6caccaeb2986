"""`python -m train.reproduction.table2`."""

from train.reproduction.table2.training import main

if __name__ == "__main__":
    main()
