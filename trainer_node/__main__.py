from trainer_node.cli import main

if __name__ == "__main__":
    main()
