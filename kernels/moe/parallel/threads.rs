//! Ranks that are threads of this process.

use std::any::Any;
use std::collections::HashMap;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use super::{Collectives, Pending, Ranks};

/// What `f` returns on each of `size` threads, in the order of ranks. Ranks must not share tensors that gradients are
/// computed through: Burn would join their graphs, and each would wait for the other.
///
/// # Panics
/// If a rank does. The others end then, as soon as they wait for it.
pub fn run<T: Send>(size: usize, f: impl Fn(Ranks) -> T + Sync) -> Vec<T> {
    run_over(f64::INFINITY, size, f)
}

/// As [`run`], over slow links: what a rank sends to others leaves it one byte after the other, and is there as soon as it
/// has left. To measure what is gained by sending while others compute, where nothing is slow.
///
/// - `bytes_per_second`: of each rank
///
/// # Panics
/// If that is not above 0, or a rank panics.
pub fn run_over<T: Send>(bytes_per_second: f64, size: usize, f: impl Fn(Ranks) -> T + Sync) -> Vec<T> {
    assert!(bytes_per_second > 0.0, "a link of {bytes_per_second} bytes per second");
    let mut outboxes: Vec<Vec<Sender<Letter>>> = (0..size).map(|_| Vec::new()).collect();
    let mut inboxes: Vec<Vec<Mutex<Inbox>>> = (0..size).map(|_| Vec::new()).collect();
    for outboxes in &mut outboxes {
        for inboxes in &mut inboxes {
            let (sender, receiver) = channel();
            outboxes.push(sender);
            inboxes.push(Mutex::new(Inbox { receiver, early: HashMap::new() }));
        }
    }
    let posts = outboxes.into_iter().zip(inboxes).enumerate();
    let link = || Link { bytes_per_second, busy: Mutex::new(Instant::now()) };
    let posts: Vec<Arc<Post>> = posts
        .map(|(rank, (outboxes, inboxes))| Arc::new(Post { rank, outboxes, inboxes, link: link() }))
        .collect();
    let of_rank = |post: Arc<Post>| {
        let members = (0..size).collect();
        let world = Threads { post: post.clone(), at: post.rank, members, group: Vec::new(), next: 0.into() };
        let result = catch_unwind(AssertUnwindSafe(|| f(Ranks::new(Arc::new(world)))));
        for outbox in &post.outboxes {
            // who has ended itself needs no notice
            let _ = outbox.send(Letter::Ended);
        }
        result
    };
    let results: Vec<Result<T, Box<dyn Any + Send>>> = thread::scope(|scope| {
        let ranks: Vec<_> = posts.into_iter().map(|post| scope.spawn(|| of_rank(post))).collect();
        ranks.into_iter().map(|rank| rank.join().unwrap_or_else(Err)).collect()
    });
    let (mut returned, mut first): (Vec<T>, Option<Box<dyn Any + Send>>) = (Vec::new(), None);
    for result in results {
        match result {
            Ok(value) => returned.push(value),
            // the rank whose panic ended the others says most
            Err(panic) if first.as_ref().is_none_or(|first| first.is::<Abandoned>()) => first = Some(panic),
            Err(_) => {}
        }
    }
    match first.map(|panic| panic.downcast::<Abandoned>()) {
        None => returned,
        Some(Ok(abandoned)) => panic!("{}", abandoned.0),
        Some(Err(panic)) => resume_unwind(panic),
    }
}

/// Why a rank ends that waited for another.
struct Abandoned(String);

/// Bytes of a rank for another.
enum Letter {
    /// For an exchange.
    Parcel(Address, Parcel),
    /// There will be no more.
    Ended,
}

/// Which exchange: the group, and how many were before in it.
type Address = (Vec<u64>, u64);

/// What is sent, and when it is there.
struct Parcel {
    bytes: Vec<u8>,
    there: Instant,
}

/// A rank's ends of the channels.
struct Post {
    rank: usize,
    outboxes: Vec<Sender<Letter>>,
    inboxes: Vec<Mutex<Inbox>>,
    link: Link,
}

/// What all that a rank sends to others goes through.
struct Link {
    bytes_per_second: f64,
    /// Until when.
    busy: Mutex<Instant>,
}

impl Link {
    /// When so many bytes have left, behind those that were sent before.
    fn leave(&self, bytes: usize) -> Instant {
        let mut busy = self.busy.lock().unwrap_or_else(PoisonError::into_inner);
        let takes = Duration::from_secs_f64(bytes as f64 / self.bytes_per_second);
        *busy = Instant::now().max(*busy) + takes;
        *busy
    }
}

/// What comes from a rank.
struct Inbox {
    receiver: Receiver<Letter>,
    /// Parcels of exchanges that were not waited for yet.
    early: HashMap<Address, Parcel>,
}

impl Post {
    /// What `from` sends for this exchange.
    fn receive(&self, from: usize, address: &Address) -> Vec<u8> {
        let mut inbox = self.inboxes[from].lock().unwrap_or_else(PoisonError::into_inner);
        loop {
            if let Some(Parcel { bytes, there }) = inbox.early.remove(address) {
                thread::sleep(there.saturating_duration_since(Instant::now()));
                return bytes;
            }
            match inbox.receiver.recv() {
                Ok(Letter::Parcel(address, parcel)) => inbox.early.insert(address, parcel),
                Ok(Letter::Ended) | Err(_) => {
                    let message = format!("rank {} waited for rank {from}, which has ended", self.rank);
                    resume_unwind(Box::new(Abandoned(message)))
                }
            };
        }
    }
}

/// A group of threads.
struct Threads {
    post: Arc<Post>,
    /// Which of the members this is.
    at: usize,
    /// Ranks among all threads.
    members: Vec<usize>,
    /// How it was split off: after how many exchanges and with what colour, from all threads on.
    group: Vec<u64>,
    /// How many exchanges there were.
    next: AtomicU64,
}

impl std::fmt::Debug for Threads {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Threads({} of {:?})", self.at, self.members)
    }
}

impl Collectives for Threads {
    fn rank(&self) -> usize {
        self.at
    }

    fn size(&self) -> usize {
        self.members.len()
    }

    fn exchange(&self, bytes: Vec<u8>, send: &[usize], receive: &[usize]) -> Pending {
        let address = (self.group.clone(), self.next.fetch_add(1, Ordering::Relaxed));
        let mut left = bytes.as_slice();
        for (member, &length) in self.members.iter().zip(send) {
            let (part, others) = left.split_at(length);
            left = others;
            let there = match *member == self.post.rank {
                true => Instant::now(),
                false => self.post.link.leave(length),
            };
            let parcel = Parcel { bytes: part.to_vec(), there };
            // who has ended will be missed when it is waited for
            let _ = self.post.outboxes[*member].send(Letter::Parcel(address.clone(), parcel));
        }
        let (post, members, receive) = (self.post.clone(), self.members.clone(), receive.to_vec());
        Pending::new(move || {
            let mut all = Vec::with_capacity(receive.iter().sum());
            for (member, length) in members.into_iter().zip(receive) {
                let part = post.receive(member, &address);
                assert_eq!(
                    part.len(),
                    length,
                    "bytes (left) of rank {member} for rank {}, and those expected",
                    post.rank
                );
                all.extend(part);
            }
            all
        })
    }

    fn split(&self, color: usize) -> Arc<dyn Collectives> {
        let after = self.next.load(Ordering::Relaxed);
        let color = color as u64;
        let lengths = vec![size_of::<u64>(); self.size()];
        let colors = self.exchange(color.to_ne_bytes().repeat(self.size()), &lengths, &lengths).wait();
        let colors = colors.chunks_exact(size_of::<u64>());
        let same = self.members.iter().zip(colors).filter(|(_, other)| *other == color.to_ne_bytes());
        let members: Vec<usize> = same.map(|(member, _)| *member).collect();
        let at = members.iter().take_while(|member| **member != self.post.rank).count();
        let group = self.group.iter().copied().chain([after, color]).collect();
        Arc::new(Threads { post: self.post.clone(), at, members, group, next: 0.into() })
    }
}
