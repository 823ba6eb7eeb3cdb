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

    /* Insert in front of `place`, which is told where that is. */
    template <class Map, class Place, class Key, class Value>
    static inline bool insert_before_or_fail(Map &into, Place *place, const Key &key,
                                             const Value &value) noexcept
    {
        try {
            *place = into.emplace_hint(*place, key, value);
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
    bint insert_before_or_fail[Map, Place, Key, Value](
        Map &into, Place *place, Key key, Value value) noexcept nogil
    bint append_or_fail[Vector, Value](Vector &to, Value value) noexcept nogil
