"""The decode step in C++ for processors, compiled when it is first wanted; without a compiler torch decodes."""
