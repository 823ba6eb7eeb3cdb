"""C++ containers, and insertions that return false when memory is short, and never throw."""

cdef extern from "ledger/ordered_map.h" namespace "vmm" nogil:
    cppclass OrderedMap[Key, Value]:
        cppclass iterator:
            Key key() noexcept
            Value *value() noexcept
            iterator operator++() noexcept
            iterator operator--() noexcept
            bint operator==(iterator) noexcept
            bint operator!=(iterator) noexcept

        @staticmethod
        void set_leaf_limit(size_t) noexcept
        size_t size() noexcept
        iterator begin() noexcept
        iterator end() noexcept
        iterator lower_bound(Key) noexcept
        iterator upper_bound(Key) noexcept
        iterator find(Key) noexcept
        size_t count(Key) noexcept
        bint insert(Key, const Value &) noexcept
        bint insert_after(iterator *, Key, const Value &) noexcept
        iterator erase(iterator) noexcept

cdef extern from *:
    """
    #include <cstddef>
    #include <new>
    #include <vector>

    /* A vector of plain structures, the first few of which need no allocation: after a system
       call malloc and free cost time that can be measured. */
    template <class Value>
    class ShortVector {
        enum { FEW = 2 };
        Value few[FEW];
        std::vector<Value> others;
        std::size_t count = 0;

    public:
        std::size_t size() const noexcept { return count; }
        bool empty() const noexcept { return count == 0; }
        const Value &operator[](std::size_t i) const noexcept
        {
            return i < FEW ? few[i] : others[i - FEW];
        }
        void push_back(const Value &value)
        {
            if (count < FEW)
                few[count] = value;
            else
                others.push_back(value);
            count++;
        }
    };

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
    cppclass ShortVector[Value]:
        size_t size() noexcept nogil
        bint empty() noexcept nogil
        const Value &operator[](size_t) noexcept nogil

    bint insert_or_fail[Map, Key, Value](Map &into, Key key, Value value) noexcept nogil
    bint append_or_fail[Vector, Value](Vector &to, Value value) noexcept nogil
