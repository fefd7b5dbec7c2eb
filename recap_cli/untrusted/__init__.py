"""What strangers give us: code of plugins, files and sizes, each handled so that it can do no harm."""
