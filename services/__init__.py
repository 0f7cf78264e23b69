"""The three processes of a key provider. They share no memory: they meet in the store and on the bus."""
