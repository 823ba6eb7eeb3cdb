/* An ordered map of plain keys and values: a B+ tree, whose leaves are a list.

   Where std::map allocates a node for every entry, this moves some entries up in a leaf. That is
   quicker after a system call, when caches are cold: allocating, freeing and rebalancing need code
   and data of their own. An entry in a full leaf takes just its own size. Leaves that are filled
   in order, up or down, are full; filled at random they are half full. An erased entry leaves
   space in its leaf, which is freed when it is empty.

   Insertion returns false, with nothing changed, when memory is short; nothing throws. An iterator
   stays valid while only larger keys than its own are inserted and erased. */

#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <type_traits>

namespace vmm {

template <class Key, class Value>
struct MapEntry {
    Key first;
    Value second;
};

template <class Key, class Value, std::size_t NODE_BYTES = 1024>
class OrderedMap {
    using Entry = MapEntry<Key, Value>;
    static_assert(std::is_trivially_copyable<Entry>::value, "entries are moved as bytes");

    struct Links {
        Links *previous, *next;
        std::size_t count;              /* of entries; 0 at the ends of the list */
    };

    enum : std::size_t {
        ENTRIES = (NODE_BYTES - sizeof(Links) - sizeof(Key)) / sizeof(Entry),
        FORKS = (NODE_BYTES - sizeof(std::size_t)) / (sizeof(Key) + sizeof(void *)),
        DEPTH = 16,                     /* a branch that was divided has two forks at least */
    };
    static_assert(ENTRIES >= 2 && FORKS >= 4, "nodes are too small");

    /* Entries in order. A leaf is empty only where it is the whole tree. */
    struct Leaf : Links {
        Key least;                      /* keys from here up to the next leaf's belong here */
        Entry entries[ENTRIES];
    };

    /* What is below; `least` of the first fork of a branch says nothing. */
    struct Fork {
        Key least;
        void *node;                     /* a branch, or on the lowest level a leaf */
    };

    struct Branch {
        std::size_t count;
        Fork forks[FORKS];
    };

    struct Step {
        Branch *branch;
        std::size_t index;              /* of the fork that was taken */
    };

    Links ends = {&ends, &ends, 0};     /* what comes before the first leaf and after the last */
    void *root = nullptr;
    std::size_t height = 0;             /* levels of branches */
    std::size_t total = 0;

    static inline std::size_t leaf_limit = ENTRIES;

public:
    /* How many entries make a leaf full, from now on, for all these maps; one at least. Tests
       lower it. */
    static void set_leaf_limit(std::size_t entries) noexcept
    {
        leaf_limit = std::min<std::size_t>(std::max<std::size_t>(entries, 1), ENTRIES);
    }

    class iterator {
        friend class OrderedMap;
        Links *leaf;
        std::size_t index;

        iterator(Links *leaf, std::size_t index) noexcept : leaf(leaf), index(index) {}

    public:
        iterator() = default;

        Entry &operator*() const noexcept { return static_cast<Leaf *>(leaf)->entries[index]; }

        Key key() const noexcept { return (**this).first; }

        Value *value() const noexcept { return &(**this).second; }

        iterator &operator++() noexcept
        {
            if (++index == leaf->count) {
                leaf = leaf->next;
                index = 0;
            }
            return *this;
        }

        iterator &operator--() noexcept
        {
            if (index == 0) {
                leaf = leaf->previous;
                index = leaf->count;
            }
            index--;
            return *this;
        }

        bool operator==(const iterator &other) const noexcept
        {
            return leaf == other.leaf && index == other.index;
        }

        bool operator!=(const iterator &other) const noexcept { return !(*this == other); }
    };

    OrderedMap() = default;
    OrderedMap(const OrderedMap &) = delete;
    OrderedMap &operator=(const OrderedMap &) = delete;

    ~OrderedMap()
    {
        if (root != nullptr)
            free_tree(root, height);
    }

    std::size_t size() const noexcept { return total; }

    iterator begin() noexcept { return settled(ends.next, 0); }

    iterator end() noexcept { return iterator(&ends, 0); }

    /* The first entry whose key is no less. */
    iterator lower_bound(Key key) noexcept
    {
        return bound(key, [](Key left, Key right) { return left < right; });
    }

    /* The first entry whose key is greater. */
    iterator upper_bound(Key key) noexcept
    {
        return bound(key, [](Key left, Key right) { return left <= right; });
    }

    iterator find(Key key) noexcept
    {
        const iterator place = lower_bound(key);
        return place != end() && (*place).first == key ? place : end();
    }

    std::size_t count(Key key) noexcept { return find(key) != end(); }

    /* Insert a key that is not there. */
    bool insert(Key key, const Value &value) noexcept
    {
        Step path[DEPTH];
        iterator place;
        if (root == nullptr && !plant())
            return false;
        Leaf *leaf = descend(key, path);
        const std::size_t index = lower_index(leaf, key);
        return insert_at(leaf, index, {key, value}, &place);
    }

    /* Insert what comes next after `place`, which goes there. */
    bool insert_after(iterator *place, Key key, const Value &value) noexcept
    {
        Leaf *leaf = static_cast<Leaf *>(place->leaf);
        std::size_t index = place->index + 1;
        if (index == leaf->count && leaf->next != &ends
            && static_cast<Leaf *>(leaf->next)->least <= key) {
            leaf = static_cast<Leaf *>(leaf->next);
            index = 0;
        }
        return insert_at(leaf, index, {key, value}, place);
    }

    /* Erase an entry: the place of the next. */
    iterator erase(iterator place) noexcept
    {
        Leaf *leaf = static_cast<Leaf *>(place.leaf);
        close_gap(leaf->entries, leaf->count, place.index);
        total--;
        if (leaf->count > 0 || height == 0)
            return settled(leaf, place.index);
        return iterator(remove(leaf), 0);
    }

private:
    /* ---- Items in a row ---------------------------------------------------------------------- */

    template <class Item>
    static void open_gap(Item *items, std::size_t &count, std::size_t at, const Item &item) noexcept
    {
        if (at < count)                 /* where a row is filled in order nothing moves */
            std::memmove(items + at + 1, items + at, (count - at) * sizeof(Item));
        items[at] = item;
        count++;
    }

    template <class Item>
    static void close_gap(Item *items, std::size_t &count, std::size_t at) noexcept
    {
        count--;
        std::memmove(items + at, items + at + 1, (count - at) * sizeof(Item));
    }

    /* Move the items from `at` on to an empty row. */
    template <class Item>
    static void move_from(Item *items, std::size_t &count, std::size_t at, Item *to,
                          std::size_t &moved) noexcept
    {
        moved = count - at;
        count = at;
        std::memcpy(to, items + at, moved * sizeof(Item));
    }

    /* ---- Searching --------------------------------------------------------------------------- */

    /* The leaf to which a key belongs, and the way there: the lowest level is path[0]. */
    Leaf *descend(Key key, Step *path) const noexcept
    {
        void *node = root;
        for (std::size_t level = height; level > 0; level--) {
            Branch *branch = static_cast<Branch *>(node);
            std::size_t low = 1, high = branch->count;
            while (low < high) {
                const std::size_t middle = (low + high) / 2;
                if (branch->forks[middle].least <= key)
                    low = middle + 1;
                else
                    high = middle;
            }
            path[level - 1] = {branch, low - 1};
            node = branch->forks[low - 1].node;
        }
        return static_cast<Leaf *>(node);
    }

    /* The first entry of a leaf that is not before a key. */
    template <class Before>
    static std::size_t index_in(const Leaf *leaf, Key key, Before before) noexcept
    {
        std::size_t low = 0, high = leaf->count;
        while (low < high) {
            const std::size_t middle = (low + high) / 2;
            if (before(leaf->entries[middle].first, key))
                low = middle + 1;
            else
                high = middle;
        }
        return low;
    }

    static std::size_t lower_index(const Leaf *leaf, Key key) noexcept
    {
        return index_in(leaf, key, [](Key left, Key right) { return left < right; });
    }

    template <class Before>
    iterator bound(Key key, Before before) noexcept
    {
        Step path[DEPTH];
        if (root == nullptr)
            return end();
        Leaf *leaf = descend(key, path);
        return settled(leaf, index_in(leaf, key, before));
    }

    /* An iterator to this place, which is the next leaf's first where the leaf ends before it. */
    static iterator settled(Links *leaf, std::size_t index) noexcept
    {
        return index == leaf->count ? iterator(leaf->next, 0) : iterator(leaf, index);
    }

    /* ---- Growing ----------------------------------------------------------------------------- */

    template <class Node>
    static Node *make() noexcept
    {
        return static_cast<Node *>(std::malloc(sizeof(Node)));
    }

    static void link(Leaf *leaf, Links *previous) noexcept
    {
        leaf->previous = previous;
        leaf->next = previous->next;
        leaf->previous->next = leaf->next->previous = leaf;
    }

    /* Make the first leaf. */
    bool plant() noexcept
    {
        Leaf *leaf = make<Leaf>();
        if (leaf == nullptr)
            return false;
        leaf->count = 0;
        leaf->least = std::numeric_limits<Key>::min();
        link(leaf, &ends);
        root = leaf;
        return true;
    }

    bool insert_at(Leaf *leaf, std::size_t index, const Entry &entry, iterator *place) noexcept
    {
        if (leaf->count >= leaf_limit)
            return divide_leaf(leaf, index, entry, place);
        open_gap(leaf->entries, leaf->count, index, entry);
        total++;
        *place = iterator(leaf, index);
        return true;
    }

    /* Insert into a full leaf. What comes after the new entry moves to a leaf of its own, or else
       the new entry does: what comes before stays, and a leaf that is filled in order stays full. */
    bool divide_leaf(Leaf *leaf, std::size_t index, const Entry &entry, iterator *place) noexcept
    {
        Step path[DEPTH];
        Branch *spare[DEPTH + 1];
        std::size_t full = 0;
        descend(leaf->least, path);
        while (full < height && path[full].branch->count == FORKS)
            full++;
        Leaf *right = make_nodes(spare, full + (full == height));
        if (right == nullptr)
            return false;
        move_from(leaf->entries, leaf->count, index, right->entries, right->count);
        if (right->count > 0) {
            leaf->entries[leaf->count++] = entry;
            *place = iterator(leaf, index);
        } else {
            right->entries[right->count++] = entry;
            *place = iterator(right, 0);
        }
        right->least = right->entries[0].first;
        link(right, leaf);
        total++;
        enter({right->least, right}, path, full, spare);
        return true;
    }

    /* A leaf and so many branches, or a null pointer when memory is short. */
    static Leaf *make_nodes(Branch **branches, std::size_t count) noexcept
    {
        Leaf *leaf = make<Leaf>();
        for (std::size_t made = 0; leaf != nullptr && made < count; made++) {
            branches[made] = make<Branch>();
            if (branches[made] != nullptr)
                continue;
            while (made > 0)
                std::free(branches[--made]);
            std::free(leaf);
            leaf = nullptr;
        }
        return leaf;
    }

    /* Enter a new node behind those of a path, on which the lowest branches are full. */
    void enter(Fork added, const Step *path, std::size_t full, Branch **spare) noexcept
    {
        for (std::size_t level = 0; level < full; level++)
            added = divide_branch(path[level], added, spare[level]);
        if (full < height) {
            Branch *branch = path[full].branch;
            open_gap(branch->forks, branch->count, path[full].index + 1, added);
            return;
        }
        Branch *top = spare[full];
        top->count = 2;
        top->forks[0] = {std::numeric_limits<Key>::min(), root};
        top->forks[1] = added;
        root = top;
        height++;
    }

    /* Enter a fork in a full branch, half of which moves to `right`: the fork to that. */
    static Fork divide_branch(Step at, const Fork &added, Branch *right) noexcept
    {
        Branch *left = at.branch;
        const std::size_t half = left->count / 2;
        move_from(left->forks, left->count, half, right->forks, right->count);
        if (at.index < half)
            open_gap(left->forks, left->count, at.index + 1, added);
        else
            open_gap(right->forks, right->count, at.index + 1 - half, added);
        return {right->forks[0].least, right};
    }

    /* ---- Shrinking --------------------------------------------------------------------------- */

    /* Remove an empty leaf, and branches that have nothing else: the next leaf. */
    Links *remove(Leaf *leaf) noexcept
    {
        Step path[DEPTH];
        Links *next = leaf->next;
        std::size_t level = 0;
        descend(leaf->least, path);
        while (path[level].branch->count == 1)
            std::free(path[level++].branch);
        Branch *branch = path[level].branch;
        close_gap(branch->forks, branch->count, path[level].index);
        if (path[level].index == 0)     /* its keys belong to the next one now */
            static_cast<Leaf *>(next)->least = leaf->least;
        leaf->previous->next = next;
        next->previous = leaf->previous;
        std::free(leaf);
        lower();
        return next;
    }

    /* Do without branches at the top that lead to one node. */
    void lower() noexcept
    {
        while (height > 0 && static_cast<Branch *>(root)->count == 1) {
            void *only = static_cast<Branch *>(root)->forks[0].node;
            std::free(root);
            root = only;
            height--;
        }
    }

    static void free_tree(void *node, std::size_t level) noexcept
    {
        for (std::size_t i = 0; level > 0 && i < static_cast<Branch *>(node)->count; i++)
            free_tree(static_cast<Branch *>(node)->forks[i].node, level - 1);
        std::free(node);
    }
};

}  // namespace vmm
