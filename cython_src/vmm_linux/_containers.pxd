"""Insertions into C++ containers that answer false, instead of throwing, when memory is short."""

cdef extern from *:
    """
    #include <new>

    template <class Map, class Key, class Value>
    static inline bool insert_or_fail(Map &into, const Key &key, const Value &value) noexcept
    {
        try {
            into.emplace(key, value);
            return true;
        } catch (const std::bad_alloc &) {
            return false;
        }
    }

    template <class Vector, class Value>
    static inline bool append_or_fail(Vector &to, const Value &value) noexcept
    {
        try {
            to.push_back(value);
            return true;
        } catch (const std::bad_alloc &) {
            return false;
        }
    }
    """
    bint insert_or_fail[Map, Key, Value](Map &into, Key key, Value value) noexcept nogil
    bint append_or_fail[Vector, Value](Vector &to, Value value) noexcept nogil
